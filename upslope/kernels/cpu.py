"""The compiled kernels as functions of tensors. All are for rows that lie one behind the other on the CPU.

Each does in one pass over memory what takes torch several, and gives what torch gives but for rounding: sums are in
fp32, a row is computed by one thread in a fixed order.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from upslope.kernels.build import library

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
BLOCK = 32  # tokens of a block of keys, as in attention.hpp
UNIT = {torch.float32: 1, torch.bfloat16: 2}  # numbers in 4 bytes, in which a cache is read
PANEL = 32  # rows of a panel of a weight, as in product.hpp
PARTS = 64  # sums over rows are made of so many partial ones, whatever the number of threads

_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES: dict[str, list[Any]] = {
    "attend": [_POINTER] * 7 + [_COUNT] * 6,
    "keep_prompts": [_POINTER] * 6 + [_COUNT] * 5,
    "add_norm": [_POINTER] * 5 + [_COUNT] * 2 + [_NUMBER],
    "norm_backward": [_POINTER] * 6 + [_COUNT] * 3,
    "swiglu": [_POINTER] * 3 + [_COUNT] * 3,
    "swiglu_backward": [_POINTER] * 5 + [_COUNT] * 2,
    "pad": [_POINTER] * 5 + [_COUNT] * 5,
    "gather": [_POINTER] * 7 + [_COUNT] * 5,
    "causal_softmax": [_POINTER] * 3 + [_COUNT] * 5 + [_NUMBER],
    "token_stats": [_POINTER] * 5 + [_COUNT] * 2 + [_NUMBER],
    "token_gradient": [_POINTER] * 6 + [_COUNT] * 3 + [_NUMBER],
    "discounted_sums": [_POINTER] * 4 + [_COUNT, _NUMBER],
    "choose": [_POINTER] * 5 + [_COUNT] * 3,
    "product": [_POINTER] * 4 + [_COUNT] * 3,
    "step": [_POINTER] * 11 + [_NUMBER],
}


def serve(*tensors: Tensor) -> bool:
    """Whether the kernels are there and know these tensors: on the CPU, all in fp32 or all in bf16."""
    first = tensors[0].dtype
    return first in SUFFIX and all(t.dtype == first and t.device.type == "cpu" for t in tensors) and available()


def available() -> bool:
    """Whether the kernels could be compiled on this machine."""
    return library() is not None


def multiplies() -> bool:
    """Whether the compiled product is there: it needs instructions for bf16 that not every processor has."""
    found = library()
    if found is None:
        return False
    found.has_product.restype = ctypes.c_int64
    return bool(found.has_product())


@cache
def _function(name: str, dtype: torch.dtype) -> Any:
    found = getattr(library(), f"{name}_{SUFFIX[dtype]}")
    found.argtypes, found.restype = SIGNATURES[name], None
    return found


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def attend(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    heads: int,
    window: int,
) -> Tensor:
    """One decoding step of attention: positions turned, the new key and value kept, softmax(q k^T / sqrt d) v.

    qkv: slots rows of (heads + 2 kv heads) x d; rope: cos and sin, slots rows of d / 2; keys (slots, kv heads,
    capacity / BLOCK, d / P, BLOCK, P); values (slots, kv heads, capacity / P, d, P), P = UNIT of the dtype; length:
    tokens that each slot holds (int64), the place of the new one; window 0: none. Returns slots rows of heads x d.
    """
    slots, (kv_heads, capacity, width) = len(length), cache_sizes(values)
    out = torch.empty(slots, heads * width, dtype=qkv.dtype)
    turn = (None, None) if rope is None else (rope[0].data_ptr(), rope[1].data_ptr())
    cache = (keys.data_ptr(), values.data_ptr(), length.data_ptr())
    sizes = (slots, heads, kv_heads, width, capacity, window)
    _function("attend", qkv.dtype)(qkv.data_ptr(), *turn, *cache, out.data_ptr(), *sizes)
    return out


def cache_sizes(values: Tensor) -> tuple[int, int, int]:
    """(kv heads, capacity, d) of a cache's values."""
    kv_heads, units, width, unit = values.shape[-4:]
    return kv_heads, units * unit, width


def keep_prompts(
    qkv: Tensor, rope: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor, entries: Tensor, heads: int
) -> None:
    """Write the keys, turned, and the values of prompts into the slots of a layer.

    qkv and rope: a row for each token of all prompts, otherwise as in `attend`; entries (int64): a prompt's first
    token, its tokens, and a slot that gets them.
    """
    kv_heads, capacity, width = cache_sizes(values)
    cos, sin = rope or (None, None)
    pointers = (_at(t) for t in (qkv, cos, sin, keys, values, entries))
    _function("keep_prompts", qkv.dtype)(*pointers, len(entries), heads, kv_heads, width, capacity)


def panels_of(weight: Tensor) -> Tensor:
    """A bf16 weight (outputs, D), D even, as `product` reads it: (outputs / 32, D / 2, 32, 2), filled up with zeros."""
    outputs, width = weight.shape
    pairs = torch.nn.functional.pad(weight.contiguous().view(torch.int32), (0, 0, 0, -outputs % PANEL))
    turned = pairs.view(-1, PANEL, width // 2).transpose(1, 2).contiguous()
    return turned.view(torch.bfloat16).view(-1, width // 2, PANEL, 2)


def rows_of(panels: Tensor, outputs: int) -> Tensor:
    """What `panels_of` was made from."""
    return panels.transpose(1, 2).reshape(-1, 2 * panels.shape[1])[:outputs]


def product(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x W^T + bias in bf16, W as panels; a row's sum is in fp32, in the order of its pairs whatever the batch."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    pointers = (_at(t) for t in (x, panels, bias, out))
    _function("product", x.dtype)(*pointers, rows, outputs, width)
    return out


@dataclass(frozen=True)
class Steps:
    """What `step` has to know of a decoder: its sizes in the order of step.hpp, and for each layer the addresses of its
    weights (int64), norms in fp32, the others as panels and biases in bf16, 0 for what is not there."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    feed_width: int
    window: int
    eps: float
    addresses: Tensor
    norm: Tensor

    def sizes(self) -> tuple[int, ...]:
        heads = (self.heads, self.kv_heads, self.head_width)
        return self.layers, self.width, *heads, self.feed_width, self.window


def step(
    known: Steps, x: Tensor, rope: tuple[Tensor, Tensor] | None, lengths: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """One token more in each slot, through all layers: hidden rows behind the final norm; x is written over.

    x: embedded tokens (slots, D); keys and values of all layers, rope and lengths as in `attend`.
    """
    slots, room, capacity = len(x), values.shape[1], cache_sizes(values)[1]
    inner = known.heads * known.head_width
    widest = max(inner + 2 * known.kv_heads * known.head_width, 2 * known.feed_width)
    work = torch.empty(slots * (known.width + inner + widest + known.feed_width), dtype=x.dtype)
    out = torch.empty_like(x)
    sizes = torch.tensor((slots, *known.sizes(), capacity, room))
    cos, sin = rope or (None, None)
    tensors = (x, cos, sin, lengths, known.addresses, known.norm, keys, values, work, out, sizes)
    _function("step", x.dtype)(*(_at(t) for t in tensors), known.eps)
    return out


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += y, in place; then x / sqrt(mean(x^2) + eps) * weight over the last axis. weight in fp32."""
    out = torch.empty_like(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    _function("add_norm", x.dtype)(_at(x), _at(y), _at(weight), _at(out), None, rows, width, eps)
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, and the reciprocal root of each row."""
    out, scale = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
    _function("add_norm", x.dtype)(_at(x), None, _at(weight), _at(out), _at(scale), scale.numel(), x.shape[-1], eps)
    return out, scale


def norm_backward(x: Tensor, grad: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `norm` by x and, in fp32, by weight."""
    out, parts = torch.empty_like(x), torch.zeros(PARTS, x.shape[-1])
    pointers = (_at(t) for t in (x, grad, weight, scale, out, parts))
    _function("norm_backward", x.dtype)(*pointers, scale.numel(), x.shape[-1], PARTS)
    return out, parts.sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both may be columns of one wider tensor. Raises ValueError for rows that lie differently."""
    if gate.stride() != up.stride() or gate.stride(1) != 1:
        raise ValueError(f"rows that lie differently: strides {gate.stride()} and {up.stride()}")
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _function("swiglu", gate.dtype)(_at(gate), _at(up), _at(out), len(gate), gate.shape[1], gate.stride(0))
    return out


def swiglu_joined(joined: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold gate and then up."""
    rows, width = joined.shape[0], joined.shape[1] // 2
    out = torch.empty(rows, width, dtype=joined.dtype)
    gate = joined.data_ptr()
    up = gate + width * joined.element_size()
    _function("swiglu", joined.dtype)(gate, up, out.data_ptr(), rows, width, 2 * width)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate) * up by both."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    pointers = (_at(t) for t in (gate, up, grad, grad_gate, grad_up))
    _function("swiglu_backward", gate.dtype)(*pointers, len(gate), gate.shape[1])
    return grad_gate, grad_up


@dataclass(frozen=True)
class Table:
    """Sequences of a ragged batch for the kernels, all int64: (B, 4) with each one's first token, its length, its
    parent's first token and length; the children of b are child[first_child[b] : first_child[b + 1]]."""

    rows: Tensor
    first_child: Tensor
    child: Tensor


def pad(x: Tensor, table: Table, places: int, rope: tuple[Tensor, Tensor] | None, *, keys: bool) -> Tensor:
    """(N, heads, d) to (B, heads, places, d), turned by rope (N rows of d / 2); keys: a parent's tokens in front."""
    sequences, (_, heads, width) = len(table.rows), x.shape
    out = x.new_empty(sequences, heads, places, width)
    cos, sin = rope or (None, None)
    pointers = (_at(t) for t in (x, cos, sin, table.rows, out))
    _function("pad", x.dtype)(*pointers, sequences, heads, places, width, keys)
    return out


def gather(padded: Tensor, table: Table, tokens: int, rope: tuple[Tensor, Tensor] | None, *, keys: bool) -> Tensor:
    """(B, heads, places, d) to (N, heads, d): each token the sum of the places that hold it, turned back by rope."""
    sequences, heads, places, width = padded.shape
    out = padded.new_empty(tokens, heads, width)
    cos, sin = rope or (None, None)
    pointers = (_at(t) for t in (padded, cos, sin, table.rows, table.first_child, table.child, out))
    _function("gather", padded.dtype)(*pointers, sequences, heads, places, width, keys)
    return out


def causal_softmax_(scores: Tensor, table: Tensor, queries: int, window: int, scale: float) -> Tensor:
    """softmax(scale scores) in place over the keys that a query may see, 0 elsewhere. scores (B, rows, keys); row r is
    of query r % queries; table: rows as `Table` has them, of which lengths and a parent's lengths are read."""
    (sequences, rows, keys), at = scores.shape, _at(table)
    _function("causal_softmax", scores.dtype)(_at(scores), None, at, sequences, rows, queries, keys, window, scale)
    return scores


def causal_softmax_backward_(
    grad: Tensor, weights: Tensor, table: Tensor, queries: int, window: int, scale: float
) -> Tensor:
    """The gradient by the scores, in place of that by the weights: scale w (dw - sum w dw)."""
    (sequences, rows, keys), at = grad.shape, _at(table)
    pointers = (_at(grad), _at(weights), at)
    _function("causal_softmax", grad.dtype)(*pointers, sequences, rows, queries, keys, window, scale)
    return grad


def token_stats(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the target's log-probability, the entropy, and log sum exp(logits / temperature), in fp32."""
    logp, entropy, norm = (torch.empty(len(logits)) for _ in range(3))
    pointers = (_at(t) for t in (logits, target, logp, entropy, norm))
    _function("token_stats", logits.dtype)(*pointers, *logits.shape, temperature)
    return logp, entropy, norm


def token_gradient_(
    logits: Tensor,
    target: Tensor,
    entropy: Tensor,
    norm: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    first: int = 0,
) -> Tensor:
    """The gradient by the logits, in their place: dlogp/dz = onehot - p, dH/dz = -p (log p + H).

    logits may be those of a part of the vocabulary, whose first entry is `first`.
    """
    pointers = (_at(t) for t in (logits, target, entropy, norm, grad_logp, grad_entropy))
    _function("token_gradient", logits.dtype)(*pointers, *logits.shape, first, temperature)
    return logits


def choose(logits: Tensor, temperature: Tensor, uniform: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """One token a row, by the inverse of the cumulative distribution of its first `valid` entries: (id, logp).

    temperature in fp32, uniform in fp64. At temperature 0: the most probable token, with its logp at 1.
    """
    ids, logp = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    pointers = (_at(t) for t in (logits, temperature, uniform, ids, logp))
    _function("choose", logits.dtype)(*pointers, *logits.shape, valid)
    return ids, logp


def discounted_sums(x: Tensor, starts: Tensor, decay: float, tail: Tensor | None) -> Tensor:
    """y_t = x_t + decay y_{t+1} inside each episode (starts: int64 offsets); y behind the last is tail, or 0; fp32."""
    out = torch.empty_like(x)
    pointers = (_at(t) for t in (x, starts, tail, out))
    _function("discounted_sums", x.dtype)(*pointers, len(starts) - 1, decay)
    return out
