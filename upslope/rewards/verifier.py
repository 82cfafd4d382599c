"""Answers judged by reasoning-gym's own rules. Its own module: the library is an extra."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from upslope.text.reasoning import library

Rows = Sequence[dict[str, Any]]


@cache
def _judge(dataset: str) -> Any:
    return library().get_score_answer_fn(dataset)


def verifier(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """The generator's score of each stripped answer, from 0 to 1. Raises ValueError for rows of another source."""
    for row in rows:
        if "dataset" not in row or "entry" not in row:
            raise ValueError(
                f"row {row.get('row_number')} is no puzzle: verifier judges rows of reasoning-gym:NAME only"
            )
    return [
        float(_judge(row["dataset"])(text.strip(), json.loads(row["entry"])))
        for text, row in zip(completions, rows, strict=True)
    ]
