"""GGUF files: the format of llama.cpp, read with the gguf package and dequantised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.checks import check_numbers, reading
from upslope.models.decoder import DecoderConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")


def read_gguf(path: Path) -> tuple[DecoderConfig, Iterator[tuple[str, Tensor]]]:
    """The configuration and, one at a time, the weights (fp32) of a GGUF file. Raises ModelError."""
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the package raises whatever a damaged header leads it to
        raise ModelError(
            f"{path} is not a whole GGUF file: {error or type(error).__name__}", "fetch it again"
        ) from None
    with reading(path):
        config = _config(reader, path)
    check_numbers(config, path)
    return config, _weights(reader, path)


def _config(reader: GGUFReader, path: Path) -> DecoderConfig:
    kind = _value(reader, "general.architecture", path)
    if kind not in ARCHITECTURES:
        raise ModelError(f"{path}: architecture {kind!r} is not known", f"known in GGUF: {', '.join(ARCHITECTURES)}")
    names = {tensor.name: tensor for tensor in reader.tensors}
    scaling = _value(reader, f"{kind}.rope.scaling.type", path, "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        raise ModelError(f"{path}: scaled rope in GGUF is not known", "use the model's safetensors")
    if _value(reader, f"{kind}.expert_count", path, 0):
        raise ModelError(f"{path}: a mixture of experts is not known", "use a dense model")
    width = _value(reader, f"{kind}.embedding_length", path)
    heads = _value(reader, f"{kind}.attention.head_count", path)
    if "token_embd.weight" not in names:
        raise ModelError(f"{path} has no token_embd.weight", "fetch it again")
    return DecoderConfig(
        vocab_size=int(names["token_embd.weight"].shape[1]),
        width=width,
        layers=_value(reader, f"{kind}.block_count", path),
        heads=heads,
        kv_heads=_value(reader, f"{kind}.attention.head_count_kv", path, heads),
        head_dim=_value(reader, f"{kind}.attention.key_length", path, width // heads),
        ffn_width=_value(reader, f"{kind}.feed_forward_length", path),
        context=_value(reader, f"{kind}.context_length", path),
        norm_eps=float(_value(reader, f"{kind}.attention.layer_norm_rms_epsilon", path)),
        rope_base=float(_value(reader, f"{kind}.rope.freq_base", path, 10_000.0)),
        qkv_bias="blk.0.attn_q.bias" in names,
        out_bias="blk.0.attn_output.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        tied="output.weight" not in names,
    )


def _weights(reader: GGUFReader, path: Path) -> Iterator[tuple[str, Tensor]]:
    kind = _value(reader, "general.architecture", path)
    heads = _value(reader, f"{kind}.attention.head_count", path)
    kv_heads = _value(reader, f"{kind}.attention.head_count_kv", path, heads)
    for tensor in reader.tensors:
        with reading(path / tensor.name):
            array = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            array = array.reshape([int(n) for n in reversed(tensor.shape)])
            if kind == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
                array = _halves(array, heads if tensor.name.endswith("attn_q.weight") else kv_heads)
        yield tensor.name, torch.from_numpy(np.ascontiguousarray(array))


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from llama.cpp's rotary order (neighbouring pairs) to ours (two halves)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _value(reader: GGUFReader, key: str, path: Path, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is None:
        if default is None:
            raise ModelError(f"{path}: the key {key} is missing", "fetch it again")
        return default
    return field.contents()
