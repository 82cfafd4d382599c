"""What needs no model: the answers that anything learned must beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def majority(train: Rows, rows: Rows, source: str | None, reference: str) -> list[str]:
    """The most frequent reference of the training rows, for every row; of equally frequent ones the first."""
    counts = Counter(_first(row[reference]) for row in train)
    return [counts.most_common(1)[0][0]] * len(rows)


def copy(train: Rows, rows: Rows, source: str | None, reference: str) -> list[str]:
    """The source itself."""
    assert source is not None
    return [str(row[source]) for row in rows]


def lead(train: Rows, rows: Rows, source: str | None, reference: str) -> list[str]:
    """The first words of the source, as many as a training reference has (the median)."""
    assert source is not None
    words = round(median(len(_first(row[reference]).split()) for row in train))
    return [" ".join(str(row[source]).split()[:words]) for row in rows]


BASELINES: Mapping[str, Callable[[Rows, Rows, str | None, str], list[str]]] = {
    function.__name__: function for function in (majority, copy, lead)
}


def _first(reference: Any) -> str:
    return str(reference[0] if isinstance(reference, list | tuple) else reference)
