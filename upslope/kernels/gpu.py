"""The kernels for a GPU as functions of tensors, by the names and the rules of those for the CPU (cpu.py).

They are written in Triton, which a torch for CUDA brings; without it everything runs on torch's own operations.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

# a torch for the processor alone may bring it too, and it takes long to import
WANTED = torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET")
try:
    if not WANTED:
        raise ImportError
    from triton import next_power_of_2

    from upslope.kernels import triton_decode as decode_kernels
    from upslope.kernels import triton_rows as row_kernels
except ImportError:  # no Triton on this machine
    next_power_of_2 = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARTS = 512  # sums over rows are made of so many partial ones
VOCABULARY = 4096  # entries of the vocabulary that one program reads at once
KEYS = 64  # of a cache that one program reads at once


def serve(*tensors: Tensor) -> bool:
    """Whether the kernels are there and know these tensors: on a GPU, of one dtype."""
    first = tensors[0].dtype
    same = all(t.dtype == first and t.device.type == "cuda" for t in tensors)
    return same and first in DTYPES and next_power_of_2 is not None


def _run(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    if all(grid):  # a grid of no programs cannot be launched
        kernel[grid](*arguments)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += y, in place; then x / sqrt(mean(x^2) + eps) * weight over the last axis. weight in fp32."""
    out, width = torch.empty_like(x), x.shape[-1]
    grid = (x.numel() // width,)
    _run(row_kernels.add_norm, grid, x, y, weight, out, None, width, eps, y is not None, False, next_power_of_2(width))
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, and the reciprocal root of each row."""
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    width = x.shape[-1]
    grid = (scale.numel(),)
    _run(row_kernels.add_norm, grid, x, None, weight, out, scale, width, eps, False, True, next_power_of_2(width))
    return out, scale


def norm_backward(x: Tensor, grad: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `norm` by x and, in fp32, by weight."""
    out, (rows, width) = torch.empty_like(x), (scale.numel(), x.shape[-1])
    programs = max(1, min(PARTS, rows))
    parts = x.new_zeros(programs, width, dtype=torch.float32)
    tensors = (x, grad, weight, scale, out, parts)
    _run(row_kernels.norm_backward, (programs,), *tensors, rows, width, programs, next_power_of_2(width))
    return out, parts.sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both may be columns of one wider tensor. Raises ValueError for rows that lie differently."""
    if gate.stride() != up.stride() or gate.stride(1) != 1:
        raise ValueError(f"rows that lie differently: strides {gate.stride()} and {up.stride()}")
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    _run(row_kernels.swiglu, (rows, -(-width // 1024)), gate, up, out, width, gate.stride(0), 1024)
    return out


def swiglu_joined(joined: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold gate and then up."""
    return swiglu(*joined.chunk(2, dim=-1))


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate) * up by both."""
    by_gate, by_up, numbers = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    _run(
        row_kernels.swiglu_backward, (-(-numbers // 1024),), gate, up, grad.contiguous(), by_gate, by_up, numbers, 1024
    )
    return by_gate, by_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotary positions as `ops.rotate` gives them, or turned back: x (N, heads, d), cos and sin N rows of d / 2."""
    tokens, heads, width = x.shape
    if x.stride()[1:] != (width, 1):
        x = x.contiguous()
    out = torch.empty(tokens, heads, width, dtype=x.dtype, device=x.device)
    sizes = (x.stride(0), heads, width // 2, -1.0 if back else 1.0)
    blocks = (next_power_of_2(heads), next_power_of_2(width // 2))
    _run(row_kernels.rotate, (tokens,), x, cos.contiguous(), sin.contiguous(), out, *sizes, *blocks)
    return out


def token_stats(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the target's log-probability, the entropy, and log sum exp(logits / temperature), in fp32."""
    rows, vocabulary = logits.shape
    logp, entropy, lse = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    block = min(VOCABULARY, next_power_of_2(vocabulary))
    _run(row_kernels.token_stats, (rows,), logits, target, logp, entropy, lse, vocabulary, 1.0 / temperature, block)
    return logp, entropy, lse


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
    rows, entries = logits.shape
    tensors = (logits, target, entropy, norm, grad_logp, grad_entropy)
    flags = (grad_logp is not None, grad_entropy is not None, 1024)
    _run(row_kernels.token_gradient, (rows, -(-entries // 1024)), *tensors, entries, first, 1.0 / temperature, *flags)
    return logits


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

    qkv: slots rows of (heads + 2 kv heads) x d; rope: cos and sin of every position, rows of d / 2; keys and values
    (slots, kv heads, capacity, d); length: tokens that each slot holds (int64), the place of the new one; window 0:
    none. Returns slots rows of heads x d.
    """
    slots, (_, kv_heads, capacity, width) = len(length), keys.shape
    out = torch.empty(slots, heads * width, dtype=qkv.dtype, device=qkv.device)
    cos, sin = rope or (None, None)
    places = 1 if cos is None else len(cos)
    sizes = (heads, kv_heads, width, capacity, width**-0.5)
    group = max(16, next_power_of_2(heads // kv_heads))  # the least that a product of matrices takes
    options = (window, rope is not None, group, max(16, next_power_of_2(width)), KEYS)
    _run(decode_kernels.attend, (slots, kv_heads), qkv, cos, sin, places, keys, values, length, out, *sizes, *options)
    return out


def choose_next(
    logits: Tensor, temperature: Tensor, facts: Tensor, key: Tensor, ids: Tensor, logp: Tensor, valid: int
) -> None:
    """One token a row, as `cpu.choose` finds it among the first `valid` entries; the host waits for nothing.

    facts (6, rows), int64: the last token, tokens held, tokens held at first, prompt key, sample, position of the first
    token; the first two are moved on. key (2), int64: words of the seed and the step, as `algo.random` folds them. The
    choice is written into ids and logp (steps, rows), in the row of how many tokens were held more than at first.
    """
    rows, vocabulary = logits.shape
    block = min(VOCABULARY, next_power_of_2(vocabulary))
    blocks = -(-valid // block)
    tops, sums = (logits.new_empty(rows, blocks, dtype=torch.float32) for _ in range(2))
    highest = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    found = (tops, sums, highest)
    _run(decode_kernels.block_sums, (rows, blocks), logits, temperature, *found, vocabulary, valid, blocks, block)
    sizes = (vocabulary, valid, blocks, facts.shape[1], block, next_power_of_2(blocks))
    _run(decode_kernels.choose, (rows,), logits, temperature, *found, facts, key, ids, logp, *sizes)
