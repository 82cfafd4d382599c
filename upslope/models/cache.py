"""Keys and values of what a decoder has read, by layer and slot.

Live slots are always 0 to n - 1, so that a step reads the cache where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upslope.kernels import cpu
from upslope.models.ops import rotate


class DecoderCache:
    """Keys and values (layers, slots, kv heads, capacity, d) and how many tokens each slot holds.

    Where the compiled kernels serve, keys stand in their blocks: (layers, slots, kv heads, capacity / 32, d, 32).
    Beyond its tokens a slot holds zeros: what is masked there is multiplied by 0, and 0 times a nan that an earlier
    sequence left would be a nan.
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
        self.values = torch.empty(0, dtype=dtype, device=device)
        self.compiled = width % cpu.BLOCK == 0 and cpu.serve(self.values)
        room = -(-capacity // cpu.BLOCK) * cpu.BLOCK if self.compiled else capacity
        shape = (room // cpu.BLOCK, width, cpu.BLOCK) if self.compiled else (room, width)
        self.keys = torch.zeros(layers, slots, kv_heads, *shape, dtype=dtype, device=device)
        self.values = torch.zeros(layers, slots, kv_heads, room, width, dtype=dtype, device=device)
        self.length = [0] * slots

    @property
    def capacity(self) -> int:
        return self.values.shape[3]

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        n = self.length[source]
        used = -(-n // cpu.BLOCK) if self.compiled else n
        self.keys[:, target, :, :used] = self.keys[:, source, :, :used]
        self.values[:, target, :, :n] = self.values[:, source, :, :n]
        self._forget(slice(None), target, n)
        self.length[target] = n

    def write(self, layer: int, slots: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Let each of the slots hold the keys and values (n, kv heads, d) of a prompt in a layer."""
        n = len(keys)
        if self.compiled:
            blocks = -(-n // cpu.BLOCK)
            padded = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, blocks * cpu.BLOCK - n))
            keys = padded.view(blocks, cpu.BLOCK, *keys.shape[1:]).permute(2, 0, 3, 1)
            n_keys = blocks
        else:
            keys, n_keys = keys.transpose(0, 1), n
        values = values.transpose(0, 1)
        for slot in slots:
            self.keys[layer, slot, :, :n_keys] = keys
            self.values[layer, slot, :, :n] = values
            self._forget(layer, slot, n)

    def _forget(self, layer: int | slice, slot: int, n: int) -> None:
        """Zeros in the place of what a slot has held behind its first n tokens, up to its length so far."""
        held = self.length[slot]
        first, last = (-(-n // cpu.BLOCK), -(-held // cpu.BLOCK)) if self.compiled else (n, held)
        self.keys[layer, slot, :, first:last] = 0
        self.values[layer, slot, :, n:held] = 0

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
        """
        n = len(lengths)
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
