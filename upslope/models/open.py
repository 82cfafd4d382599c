"""The table of model kinds: which class reads, writes, makes and runs a model. The one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from upslope.config import Scratch
from upslope.errors import ModelError
from upslope.models.decoder import Decoder, DecoderConfig
from upslope.models.encdec import EncDec, EncDecConfig
from upslope.models.encdec_hf import ARCHITECTURES, load_encdec, save_encdec
from upslope.models.encdec_runner import EncDecRunner
from upslope.models.encoder import Encoder, EncoderConfig
from upslope.models.encoder_hf import MODEL_TYPES as ENCODERS
from upslope.models.encoder_hf import load_encoder, save_encoder
from upslope.models.encoder_runner import EncoderRunner
from upslope.models.fallback import CONTEXTS, Fallback, FallbackRunner, load_fallback, save_fallback
from upslope.models.gguf import read_gguf
from upslope.models.hf import download, load_decoder, read_config, save_decoder
from upslope.models.lstm import LSTM, MODEL_TYPE, LSTMConfig, LSTMRunner, load_lstm, save_lstm
from upslope.models.names import HUGGING_FACE
from upslope.models.runner import DecoderRunner
from upslope.models.stack import StackConfig
from upslope.models.trunk import Runner, Trunk


@dataclass(frozen=True)
class Kind:
    """One kind of model. model_types: what config.json calls it; load, save: a folder; scratch: from a recipe."""

    words: str
    trunk: type[Trunk]
    runner: Callable[..., Runner]
    model_types: tuple[str, ...]
    load: Callable[..., Trunk]
    save: Callable[..., None]
    scratch: Callable[[Scratch, int], Trunk] | None = None


def _heads(shape: Scratch) -> int:
    return shape.heads or max(1, shape.width // 64)


def _gated_width(shape: Scratch) -> int:
    return shape.ffn_width or 8 * -(-shape.width // 3)  # as many weights as a plain layer of 4 x width


def _new_decoder(shape: Scratch, vocab_size: int) -> Decoder:
    heads = _heads(shape)
    return Decoder(
        DecoderConfig(
            vocab_size=vocab_size,
            width=shape.width,
            layers=shape.layers,
            heads=heads,
            kv_heads=shape.kv_heads or heads,
            head_dim=shape.width // heads,
            ffn_width=_gated_width(shape),
            context=shape.context,
            tied=shape.tied,
        )
    )


def _new_lstm(shape: Scratch, vocab_size: int) -> LSTM:
    return LSTM(LSTMConfig(vocab_size, shape.width, shape.layers, shape.context, shape.tied))


def _new_encdec(shape: Scratch, vocab_size: int) -> EncDec:
    """Of T5 1.1's shape, its logits not scaled. 0 and 1 are the BOS and EOS of a tokenizer that is trained here."""
    heads = _heads(shape)
    encoder = StackConfig(
        width=shape.width,
        layers=shape.layers,
        heads=heads,
        head_dim=shape.width // heads,
        ffn_width=_gated_width(shape),
        context=shape.context,
    )
    decoder = replace(encoder, across=True)
    return EncDec(EncDecConfig(vocab_size, encoder, decoder, tied=shape.tied, scale_logits=False, bos_id=0))


def _new_encoder(shape: Scratch, vocab_size: int) -> Encoder:
    """Of BERT's shape."""
    heads = _heads(shape)
    stack = StackConfig(
        width=shape.width,
        layers=shape.layers,
        heads=heads,
        head_dim=shape.width // heads,
        ffn_width=shape.ffn_width or 4 * shape.width,
        context=shape.context,
        norm="layer",
        norm_eps=1e-12,
        pre_norm=False,
        embed_norm=True,
        bias=True,
        scaled=True,
        gated=False,
        activation="gelu",
        position="learned",
    )
    return Encoder(EncoderConfig(vocab_size, stack))


KINDS: dict[str, Kind] = {
    "decoder": Kind("a decoder", Decoder, DecoderRunner, tuple(HUGGING_FACE), load_decoder, save_decoder, _new_decoder),
    "lstm": Kind("an LSTM", LSTM, LSTMRunner, (MODEL_TYPE,), load_lstm, save_lstm, _new_lstm),
    "encdec": Kind(
        "an encoder-decoder", EncDec, EncDecRunner, tuple(ARCHITECTURES), load_encdec, save_encdec, _new_encdec
    ),
    "encoder": Kind("an encoder", Encoder, EncoderRunner, ENCODERS, load_encoder, save_encoder, _new_encoder),
    "fallback": Kind("a decoder", Fallback, FallbackRunner, tuple(CAUSAL), load_fallback, save_fallback),  # the last
}


def load_model(source: Path | str, *, dtype: torch.dtype = torch.float32) -> Trunk:
    """A model of any kind from a folder in Hugging Face layout, a .gguf file or a hub id. Raises ModelError."""
    path = _local(source)
    return _kind_at(path).load(path, dtype=dtype)


@dataclass(frozen=True)
class Outline:
    """What a model is. kind: a key of KINDS; written: how many tokens it sees, None where config.json has no key."""

    kind: str
    needs_source: bool
    written: int | None
    file: Path | None = field(default=None, compare=False)

    @cached_property
    def context(self) -> int | None:
        """How many tokens it sees; of a GGUF file by its header, which takes seconds and so waits until it is asked."""
        return read_gguf(self.file)[0].context if self.file else self.written


def outline(source: Path | str | Scratch) -> Outline:
    """Of the model there, by its configuration alone, or of one to be made. Raises ModelError."""
    if isinstance(source, Scratch):
        return Outline(source.kind, KINDS[source.kind].trunk.needs_source, source.context)
    path = _local(source)
    kind = _kind_at(path)
    name = next(name for name, known in KINDS.items() if known is kind)
    if path.is_file():
        return Outline(name, False, None, path)
    raw = read_config(path)
    found = (raw[key] for key in (*CONTEXTS, "context") if isinstance(raw.get(key), int))
    return Outline(name, kind.trunk.needs_source, next(found, None))


def save_model(model: Trunk, folder: Path) -> None:
    """Write config.json and model.safetensors; weights in their own dtype. Raises ModelError."""
    _kind_of(model).save(model, folder)


def make_runner(model: Trunk, *, dtype: torch.dtype) -> Runner:
    """The runner of the model's kind, which holds its weights in dtype."""
    return _kind_of(model).runner(model, dtype=dtype)


def new_model(shape: Scratch, vocab_size: int, seed: int) -> Trunk:
    """A model of a recipe's table [model], its weights from the seed alone. Raises ModelError for what cannot be."""
    made = KINDS[shape.kind].scratch
    assert made is not None
    return made(shape, vocab_size).init_weights(seed)


def _kind_of(model: Any) -> Kind:
    for kind in KINDS.values():
        if type(model) is kind.trunk:
            return kind
    raise ModelError(f"{type(model).__name__} is no model kind", f"known: {', '.join(KINDS)}")


def _local(source: Path | str) -> Path:
    path = Path(source)
    return path if path.exists() else download(str(source))


def _kind_at(path: Path) -> Kind:
    """The kind of the model in a folder or file. Raises ModelError for an architecture that none is."""
    if path.is_file():
        return KINDS["decoder"]
    model_type = read_config(path)["model_type"]
    for kind in KINDS.values():
        if model_type in kind.model_types:
            return kind
    known = ", ".join(name for key, kind in KINDS.items() for name in kind.model_types if key != "fallback")
    raise ModelError(
        f"{path}: architecture {model_type!r:.80} is not known",
        f"known: {known}, and the causal models of transformers",
    )
