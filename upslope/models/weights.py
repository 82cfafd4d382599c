"""Weights from a folder into a model whose names differ: strictly, or an error that names every difference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from upslope.errors import ModelError
from upslope.models.checks import reading

SHOWN = 10  # names printed of a difference


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a folder's safetensors files, one at a time. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with reading(index):
            files = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    else:
        files = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no model.safetensors", "upslope reads no pickled weights: save it as safetensors"
        )
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a mapping
                    yield key, tensors.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{folder / name} is damaged or cut short: {error}", "fetch or write it again") from None


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype, where: Path
) -> None:
    """Give a model (on the meta device) its weights. names: ours -> theirs; weights: theirs, without what is ignored.

    Raises ModelError for what is missing, extra or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {ours: weights[theirs] for ours, theirs in names.items() if ours in expected and theirs in weights}
    known = {names.get(ours) for ours in expected}
    missing = [names.get(ours, ours) for ours in expected if ours not in found]
    extra = [name for name in weights if name not in known]
    wrong = [
        f"{names[ours]} is {_shape(tensor.shape)}, expected {_shape(expected[ours])}"
        for ours, tensor in found.items()
        if tuple(tensor.shape) != expected[ours]
    ]
    report_differences(missing, extra, wrong, where)
    model.load_state_dict({ours: tensor.to(dtype).contiguous() for ours, tensor in found.items()}, assign=True)


def report_differences(missing: list[str], extra: list[str], wrong: list[str], where: Path) -> None:
    """Raise ModelError where there is any."""
    labels = (("missing", missing), ("extra", extra), ("of another shape", wrong))
    problems = [f"{len(names)} {label}: {some(names)}" for label, names in labels if names]
    if problems:
        raise ModelError(
            f"{where}: weights do not fit the configuration; {'; '.join(problems)}", "use the model's own config.json"
        )


def some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
