"""What a completion is compared with: the row's reference, as [task] names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMN = "reference"  # what task.reference is called in the rows that rewards and metrics are given


def references(row: Mapping[str, Any]) -> list[str]:
    """The reference of a row, or the several of it (a list of texts). Raises ValueError, with the row's number."""
    found = row.get(COLUMN)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        number = f"row {row['row_number']}" if "row_number" in row else "a row"
        raise ValueError(f"{number} has no reference, but {found!r:.40}: set task.reference to a column of texts")
    return list(texts)


def all_references(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The references of each row."""
    return [references(row) for row in rows]
