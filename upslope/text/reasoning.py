"""Rows by the generators of reasoning-gym, an extra: `reasoning-gym:NAME?size=500&seed=1&key=value` in [data].

Columns: question, answer, dataset, entry (JSON, what the verifier reads). The metric `verifier` scores an answer by the
generator's own rule, which knows more right answers than the one written down. Some generators write none down.
"""

from __future__ import annotations

import importlib
import json
from typing import Any
from urllib.parse import parse_qsl

from upslope.errors import DataError

INSTALL = "pip install 'upslope[reasoning]'"
SIZE = 2000


def library() -> Any:
    """reasoning-gym, imported when it is asked for. Raises DataError where it is not installed."""
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError:
        raise DataError("this task needs reasoning-gym, which is not here", INSTALL) from None


def puzzles(source: str) -> list[dict[str, Any]]:
    """The rows of NAME?key=value&...; the same source gives the same rows. Raises DataError."""
    name, _, query = source.partition("?")
    options: dict[str, Any] = {"size": SIZE, "seed": 0}
    for key, value in parse_qsl(query):
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    gym = library()
    try:
        made = gym.create_dataset(name, **options)
        return [
            {
                "question": entry["question"],
                "answer": None if entry["answer"] is None else str(entry["answer"]),
                "dataset": name,
                "entry": json.dumps(entry, default=str),
            }
            for entry in made
        ]
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"reasoning-gym makes no {source!r}: {error}", "check the name and its settings") from None
