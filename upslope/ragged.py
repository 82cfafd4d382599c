"""The one batch layout: token sequences laid end to end, with offsets instead of padding.

    ids_N     = [ a0 a1 a2 | b0 b1 | c0 c1 c2 c3 ]        starts = [0, 3, 5, 9]

A sequence may continue another one of the batch, its parent: `parent = [-1, 0, 0]` says that b and c both
follow a, so that a prompt shared by G samples is held, and computed, once. A parent has no parent itself.
Lengths alone say what is real; there is no pad id and no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """B token sequences end to end: ids_N (int64), starts (B + 1 offsets) and each one's parent (-1: none)."""

    ids_N: Tensor
    starts: tuple[int, ...]
    parent: tuple[int, ...]

    @staticmethod
    def of(sequences: Sequence[Sequence[int]], parent: Sequence[int] | None = None) -> Ragged:
        """Lay sequences end to end. Raises ValueError for a parent that is missing, nested or itself."""
        starts = [0]
        for sequence in sequences:
            starts.append(starts[-1] + len(sequence))
        parents = tuple(parent) if parent is not None else (-1,) * len(sequences)
        if len(parents) != len(sequences):
            raise ValueError(f"{len(parents)} parents for {len(sequences)} sequences")
        for b, p in enumerate(parents):
            if p != -1 and (not 0 <= p < len(sequences) or parents[p] != -1):
                raise ValueError(f"sequence {b} names {p} as parent, which is missing or has a parent itself")
        flat = [token for sequence in sequences for token in sequence]
        return Ragged(torch.tensor(flat, dtype=torch.int64), tuple(starts), parents)

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def tokens(self) -> int:
        """N, the tokens that are computed: a shared parent counts once."""
        return self.starts[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Own tokens of each sequence, without its parent's."""
        return tuple(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))

    @cached_property
    def prefix_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence's parent; 0 where there is none."""
        return tuple(self.lengths[p] if p >= 0 else 0 for p in self.parent)

    @cached_property
    def has_parents(self) -> bool:
        return any(p >= 0 for p in self.parent)

    @cached_property
    def positions(self) -> Tensor:
        """position_N: each token's place in its sequence, counted through the parent."""
        count = torch.tensor(self.lengths, dtype=torch.int64)
        shift = torch.tensor(self.prefix_lengths, dtype=torch.int64) - torch.tensor(self.starts[:-1], dtype=torch.int64)
        return torch.arange(self.tokens) + shift.repeat_interleave(count)

    @cached_property
    def previous(self) -> Tensor:
        """previous_N: the index of the token before each token, through the parent; -1 for a first token.

        The hidden state at `previous[n]` is the one that predicts token n, and whose value is that of the
        state in which token n was chosen.
        """
        previous = torch.arange(-1, self.tokens - 1)
        for start, end, p in zip(self.starts, self.starts[1:], self.parent, strict=False):
            if end > start:
                has_prefix = p >= 0 and self.lengths[p] > 0
                previous[start] = self.starts[p + 1] - 1 if has_prefix else -1
        return previous

    @cached_property
    def last(self) -> Tensor:
        """last_B: the index of each sequence's last token, its parent's where it has none of its own."""
        ends = []
        for b, p in enumerate(self.parent):
            if self.lengths[b]:
                ends.append(self.starts[b + 1] - 1)
            elif p >= 0 and self.lengths[p]:
                ends.append(self.starts[p + 1] - 1)
            else:
                raise ValueError(f"sequence {b} of the batch is empty: it has no last token")
        return torch.tensor(ends, dtype=torch.int64)

    def sequence(self, b: int) -> list[int]:
        """The whole of sequence b, its parent's tokens first."""
        own: list[int] = self.ids_N[self.starts[b] : self.starts[b + 1]].tolist()
        return (self.sequence(self.parent[b]) if self.parent[b] >= 0 else []) + own

    def to(self, device: torch.device | str) -> Ragged:
        """The same batch with its ids on another device."""
        return Ragged(send(self.ids_N, device), self.starts, self.parent)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; one that goes from the CPU to a GPU waits for nothing that is still computed there.

    A plain `.to` would wait until all work before it is done, and the GPU would then wait for the next.
    """
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
