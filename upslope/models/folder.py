"""Models of our own in a folder: config.json with a model_type of ours, and model.safetensors. Strict both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from upslope.errors import ModelError
from upslope.models.checks import check_field, reading
from upslope.models.hf import read_config
from upslope.models.trunk import Trunk
from upslope.models.weights import fill, read_weights

Made = TypeVar("Made", bound=Trunk)


def save_folder(model: Trunk, model_type: str, folder: Path) -> None:
    """Write a model whose config is a dataclass; weights in their own dtype, by their own names."""
    config: Any = model.config
    raw = {"model_type": model_type, **asdict(config)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def load_folder(folder: Path, made: Callable[[Any], Made], config: type, dtype: torch.dtype) -> Made:
    """Read a model that `save_folder` wrote. Raises ModelError for what is missing, extra, damaged or cannot be."""
    raw = {key: value for key, value in read_config(folder).items() if key != "model_type"}
    names = {field.name for field in fields(config)}
    strange = sorted(raw.keys() ^ names)
    if strange:
        raise ModelError(f"{folder}: config.json has no or an unknown {strange[0]!r:.80}", "fetch it again")
    for name, value in raw.items():
        check_field(name, value, folder)
    with torch.device("meta"), reading(folder):
        model = made(config(**raw))
    weights = dict(read_weights(folder))
    fill(model, weights, {name: name for name in model.state_dict()}, dtype, folder)
    return model
