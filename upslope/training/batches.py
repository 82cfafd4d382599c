"""Which items make an optimizer step, and which of them are computed at once."""

from __future__ import annotations

from collections.abc import Sequence

from upslope.algo.random import permutation


def batch_indices(items: int, batch: int, step: int, *key: int | str) -> list[int]:
    """The items of one optimizer step, from its number alone: `batch` of them, behind those of the steps before."""
    return items_from(items, step * batch, batch, *key)


def items_from(items: int, position: int, count: int, *key: int | str) -> list[int]:
    """`count` items from a position of an endless walk: epoch after epoch, each item once in each.

    The order of epoch e is a permutation keyed by (key, e); a batch may take the end of one epoch and the start
    of the next, so that no item is dropped or weighted twice.
    """
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, offset = divmod(position + len(chosen), items)
        order = permutation(items, *key, epoch)
        chosen.extend(int(i) for i in order[offset : offset + count - len(chosen)])
    return chosen


def micro_batches(lengths: Sequence[int], budget: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Split indices into parts of at most `budget` tokens, similar lengths together; a group stays adjacent.

    An item longer than the budget is a part by itself. The parts change memory and speed, never the gradient.
    """
    longest: dict[int, int] = {}
    for i, length in enumerate(lengths):
        group = groups[i] if groups is not None else i
        longest[group] = max(longest.get(group, 0), length)

    def key(i: int) -> tuple[int, int, int]:
        group = groups[i] if groups is not None else i
        return longest[group], group, i

    parts: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=key):
        if not parts or tokens + lengths[i] > budget:
            parts.append([])
            tokens = 0
        parts[-1].append(i)
        tokens += lengths[i]
    return parts
