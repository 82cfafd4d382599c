"""Answers judged by reasoning-gym's own rules. Its own module: the library is an extra.

Some rules evaluate what an answer says, which can take for ever: the metric's table says that it stays apart.
"""

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
    """The generator's score of each stripped answer, from 0 to 1, 0 for one that its rules cannot read.

    Raises ValueError for rows of another source.
    """
    for row in rows:
        if "dataset" not in row or "entry" not in row:
            raise ValueError(
                f"row {row.get('row_number')} is no puzzle: verifier judges rows of reasoning-gym:NAME only"
            )
    return [_score(text.strip(), row) for text, row in zip(completions, rows, strict=True)]


def _score(answer: str, row: dict[str, Any]) -> float:
    judge, entry = _judge(row["dataset"]), json.loads(row["entry"])
    try:
        return float(judge(answer, entry))
    except Exception:  # the generators parse as they please, and let whatever parsing raises through
        return 0.0
