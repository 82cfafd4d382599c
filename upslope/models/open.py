"""The table of model kinds: which class reads, writes, makes and runs a model. The one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upslope.config import Scratch
from upslope.errors import ModelError
from upslope.models.decoder import Decoder, DecoderConfig
from upslope.models.hf import download, load_decoder, read_config, save_decoder
from upslope.models.lstm import LSTM, MODEL_TYPE, LSTMConfig, LSTMRunner, load_lstm, save_lstm
from upslope.models.names import HUGGING_FACE
from upslope.models.runner import DecoderRunner
from upslope.models.trunk import Runner, Trunk


@dataclass(frozen=True)
class Kind:
    """One kind of model. model_types: what config.json calls it; load and save: a folder; scratch: from a recipe."""

    trunk: type[Trunk]
    runner: Callable[..., Runner]
    model_types: tuple[str, ...]
    load: Callable[..., Trunk]
    save: Callable[..., None]
    scratch: Callable[[Scratch, int], Trunk]


def _new_decoder(shape: Scratch, vocab_size: int) -> Decoder:
    heads = shape.heads or max(1, shape.width // 64)
    return Decoder(
        DecoderConfig(
            vocab_size=vocab_size,
            width=shape.width,
            layers=shape.layers,
            heads=heads,
            kv_heads=shape.kv_heads or heads,
            head_dim=shape.width // heads,
            ffn_width=shape.ffn_width or 8 * -(-shape.width // 3),  # as many weights as a plain one of 4 x width
            context=shape.context,
            tied=shape.tied,
        )
    )


def _new_lstm(shape: Scratch, vocab_size: int) -> LSTM:
    return LSTM(LSTMConfig(vocab_size, shape.width, shape.layers, shape.context, shape.tied))


KINDS: dict[str, Kind] = {
    "decoder": Kind(Decoder, DecoderRunner, tuple(HUGGING_FACE), load_decoder, save_decoder, _new_decoder),
    "lstm": Kind(LSTM, LSTMRunner, (MODEL_TYPE,), load_lstm, save_lstm, _new_lstm),
}


def load_model(source: Path | str, *, dtype: torch.dtype = torch.float32) -> Trunk:
    """A model of any kind from a folder in Hugging Face layout, a .gguf file or a hub id. Raises ModelError."""
    path = Path(source)
    if not path.exists():
        path = download(str(source))
    if path.is_file():
        return load_decoder(path, dtype=dtype)
    raw = read_config(path)
    for kind in KINDS.values():
        if raw["model_type"] in kind.model_types:
            return kind.load(path, dtype=dtype)
    known = ", ".join(name for kind in KINDS.values() for name in kind.model_types)
    raise ModelError(f"{path}: architecture {raw['model_type']!r:.80} is not known", f"known: {known}")


def save_model(model: Trunk, folder: Path) -> None:
    """Write config.json and model.safetensors; weights in their own dtype. Raises ModelError."""
    _kind_of(model).save(model, folder)


def make_runner(model: Trunk, *, dtype: torch.dtype) -> Runner:
    """The runner of the model's kind, which holds its weights in dtype."""
    return _kind_of(model).runner(model, dtype=dtype)


def new_model(shape: Scratch, vocab_size: int, seed: int) -> Trunk:
    """A model of a recipe's table [model], its weights from the seed alone. Raises ModelError for what cannot be."""
    return KINDS[shape.kind].scratch(shape, vocab_size).init_weights(seed)


def _kind_of(model: Any) -> Kind:
    for kind in KINDS.values():
        if type(model) is kind.trunk:
            return kind
    raise ModelError(f"{type(model).__name__} is no model kind", f"known: {', '.join(KINDS)}")
