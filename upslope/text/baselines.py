"""What needs no model: the answers that anything learned must beat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from upslope.algo.random import stream

Rows = Sequence[Mapping[str, Any]]


def majority(train: Rows, rows: Rows, source: str | None, reference: str, passages: str | None = None) -> list[str]:
    """The most frequent reference of the training rows, for every row; of equally frequent ones the first."""
    counts = Counter(_first(row[reference]) for row in train)
    return [counts.most_common(1)[0][0]] * len(rows)


def copy(train: Rows, rows: Rows, source: str | None, reference: str, passages: str | None = None) -> list[str]:
    """The source itself."""
    assert source is not None
    return [str(row[source]) for row in rows]


def lead(train: Rows, rows: Rows, source: str | None, reference: str, passages: str | None = None) -> list[str]:
    """The first words of the source, as many as a training reference has (the median)."""
    assert source is not None
    words = round(median(len(_first(row[reference]).split()) for row in train))
    return [" ".join(str(row[source]).split()[:words]) for row in rows]


def random(train: Rows, rows: Rows, source: str | None, reference: str, passages: str | None = None) -> list[str]:
    """The number of a passage by a draw that the row's passages alone decide."""
    assert passages is not None
    return [str(int(stream(0, "baseline", *row[passages]).integers(len(row[passages])))) for row in rows]


def overlap(train: Rows, rows: Rows, source: str | None, reference: str, passages: str | None = None) -> list[str]:
    """The number of the passage that shares the most words with the source, for its length; of equals the first.

    share = common words / sqrt(words of the passage), each word counted once; words are what is between other signs.
    """
    assert passages is not None and source is not None
    answers = []
    for row in rows:
        asked = _words(str(row[source]))
        shares = [len(asked & found) / max(1, len(found)) ** 0.5 for found in map(_words, row[passages])]
        answers.append(str(shares.index(max(shares))))
    return answers


BASELINES: Mapping[str, Callable[..., list[str]]] = {
    function.__name__: function for function in (majority, copy, lead, random, overlap)
}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _first(reference: Any) -> str:
    return str(reference[0] if isinstance(reference, list | tuple) else reference)
