"""Which items make an optimizer step, and which of them are computed at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upslope.algo.random import permutation
from upslope.ragged import Ragged


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


def micro_batches(
    lengths: Sequence[int],
    budget: int,
    groups: Sequence[int] | None = None,
    shared: Sequence[int] | None = None,
) -> list[list[int]]:
    """Split indices into parts of at most `budget` tokens, similar lengths together; a group stays adjacent.

    shared: how many of an item's tokens its group has in common; a part computes, and counts, them once. An item longer
    than the budget is a part by itself. The parts change memory and speed, never the gradient.
    """
    group_of = range(len(lengths)) if groups is None else groups
    longest: dict[int, int] = {}
    for group, length in zip(group_of, lengths, strict=True):
        longest[group] = max(longest.get(group, 0), length)
    parts: list[list[int]] = []
    tokens, last = 0, None
    for i in sorted(range(len(lengths)), key=lambda i: (longest[group_of[i]], group_of[i], i)):
        known = shared[i] if shared is not None and group_of[i] == last else 0
        if not parts or tokens + lengths[i] - known > budget:
            parts.append([])
            tokens, known = 0, 0
        parts[-1].append(i)
        tokens += lengths[i] - known
        last = group_of[i]
    return parts


def lay_out_texts(texts: Sequence[Sequence[int]], prompts: Sequence[int], needs_source: bool) -> tuple[Ragged, Tensor]:
    """Texts as sequences, in order, and where each of their tokens stands in the batch, text by text.

    prompts: how many tokens of each text are its prompt. For a model kind that needs_source the prompt becomes the
    text's parent (its first token, where it has no prompt): all of these stand before the rows of the texts.
    """
    lengths = torch.tensor([len(text) for text in texts])
    if not needs_source:
        return Ragged.of(texts), torch.arange(int(lengths.sum()))
    cuts = torch.tensor([max(1, prompt) for prompt in prompts])
    sources = [text[:cut] for text, cut in zip(texts, cuts.tolist(), strict=True)]
    rest = [text[cut:] for text, cut in zip(texts, cuts.tolist(), strict=True)]
    batch = Ragged.of([*sources, *rest], [*[-1] * len(texts), *range(len(texts))])
    starts = torch.tensor(batch.starts[:-1])
    column = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    cut, source, own = (x.repeat_interleave(lengths) for x in (cuts, starts[: len(texts)], starts[len(texts) :]))
    return batch, torch.where(column < cut, source + column, own + column - cut)
