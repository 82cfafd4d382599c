"""Keys and values of what a decoder has read, by layer and slot.

Live slots are always 0 to n - 1, so that a step reads the cache where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from upslope.kernels import cpu, gpu
from upslope.models.ops import rotate
from upslope.ragged import send


class Entries:
    """Where prompts go: rows of (a prompt's first token, how many there are, a slot that gets them)."""

    def __init__(self, rows: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self.rows, self.device = rows, device

    @cached_property
    def table(self) -> Tensor:
        """The rows, as the compiled kernels read them."""
        return torch.tensor(self.rows, dtype=torch.int64)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token that is kept: its row of the batch, its slot and its place there."""
        first, count, slot = self.table.unbind(1)
        place = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        rows = place + first.repeat_interleave(count)
        places = torch.stack((rows, slot.repeat_interleave(count), place))
        rows, slot, place = send(places, self.device).unbind()
        return rows, slot, place


class DecoderCache:
    """Keys and values (layers, slots, kv heads, capacity, d) and how many tokens each slot holds.

    Where the compiled kernels serve, they lie as `cpu.attend` reads them. Where none do, a slot holds zeros beyond its
    tokens: what is masked there is multiplied by 0, and 0 times a nan that an earlier sequence left would be a nan.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        empty = torch.empty(0, dtype=dtype, device=device)
        self.compiled = width % cpu.BLOCK == 0 and cpu.serve(empty)
        self.on_gpu = width % 2 == 0 and gpu.serve(empty)
        self.length = [0] * slots
        if self.compiled:
            blocks, unit = -(-capacity // cpu.BLOCK), cpu.UNIT[dtype]
            self.keys = torch.empty(layers, slots, kv_heads, blocks, width // unit, cpu.BLOCK, unit, dtype=dtype)
            self.values = torch.empty(layers, slots, kv_heads, blocks * cpu.BLOCK // unit, width, unit, dtype=dtype)
        else:
            shape = (layers, slots, kv_heads, capacity, width)
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        n = self.length[source]
        n_keys, n_values = (-(-n // size) for size in self._sizes())
        self.keys[:, target, :, :n_keys] = self.keys[:, source, :, :n_keys]
        self.values[:, target, :, :n_values] = self.values[:, source, :, :n_values]
        self._forget(slice(None), target, n)
        self.length[target] = n

    def write(
        self,
        layer: int,
        entries: Entries,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        heads: int,
    ) -> None:
        """Let slots hold the keys, turned by rope, and values of whole prompts in a layer.

        qkv (N, heads + 2 kv heads, d) has a row for each token of all prompts, rope cos and sin (N, d / 2).
        """
        if self.compiled:
            cpu.keep_prompts(qkv, rope, self.keys[layer], self.values[layer], entries.table, heads)
            return
        kv_heads = self.values.shape[2]
        keys, values = qkv[:, heads:].split(kv_heads, dim=1)
        if rope is not None:
            keys = rotate(keys, rope[0][:, None], rope[1][:, None])
        if self.on_gpu:
            rows, slots, places = entries.places
            self.keys[layer][slots, :, places] = keys[rows]
            self.values[layer][slots, :, places] = values[rows]
            return
        for start, n, slot in entries.rows:
            self.keys[layer, slot, :, :n] = keys[start : start + n].transpose(0, 1)
            self.values[layer, slot, :, :n] = values[start : start + n].transpose(0, 1)
            self._forget(layer, slot, n)

    def _sizes(self) -> tuple[int, int]:
        """Tokens in one place of keys and of values."""
        return (cpu.BLOCK, self.values.shape[-1]) if self.compiled else (1, 1)

    def _forget(self, layer: int | slice, slot: int, n: int) -> None:
        """Zeros in the place of what a slot has held behind its first n tokens, up to its length so far."""
        if not self.compiled and not self.on_gpu:  # the kernels read no further than a slot's tokens
            self.keys[layer, slot, :, n : self.length[slot]] = 0
            self.values[layer, slot, :, n : self.length[slot]] = 0

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        lengths: Tensor,
        heads: int,
        window: int | None,
    ) -> Tensor:
        """One token more in each of the first slots: its key and value are kept, its queries look at all of its slot.

        qkv: rows of (heads + 2 kv heads) x d, one for each of lengths (S, the tokens held before); rows of heads x d.
        rope: cos and sin of these places, on a GPU of all places.
        """
        n = len(lengths)
        if self.on_gpu:
            return gpu.attend(qkv, rope, self.keys[layer], self.values[layer], lengths, heads, window or 0)
        if self.compiled:
            return cpu.attend(qkv, rope, self.keys[layer], self.values[layer], lengths, heads, window or 0)
        kv_heads, d = self.values.shape[2], self.values.shape[4]
        heads_of = qkv.view(n, heads + 2 * kv_heads, d)
        qk, v = heads_of[:, : heads + kv_heads], heads_of[:, heads + kv_heads :]
        if rope is not None:
            qk = rotate(qk, rope[0][:, None], rope[1][:, None])
        slots = torch.arange(n, device=qkv.device)
        keys, values = self.keys[layer], self.values[layer]
        keys[slots, :, lengths] = qk[:, heads:]
        values[slots, :, lengths] = v
        longest = max(self.length[:n]) + 1
        q = qk[:, :heads].reshape(n, kv_heads, heads // kv_heads, d)
        # keys first: a product with keys that are turned on the fly would copy them
        scores = torch.matmul(keys[:n, :, :longest], q.transpose(-1, -2)).transpose(-1, -2).float()
        allowed = _allowed(lengths, longest, window)
        weights = torch.softmax((scores * d**-0.5).masked_fill(~allowed, float("-inf")), dim=-1).to(qkv.dtype)
        return torch.matmul(weights, values[:n, :, :longest]).reshape(n, -1)


def _allowed(lengths: Tensor, longest: int, window: int | None) -> Tensor:
    """(S, 1, 1, longest): where a slot's tokens lie, not beyond them nor before its window."""
    key = torch.arange(longest, device=lengths.device)
    allowed = key <= lengths[:, None]
    if window is not None:
        allowed &= key > lengths[:, None] - window
    return allowed[:, None, None, :]
