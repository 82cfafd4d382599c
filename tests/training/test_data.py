"""From a recipe's rows to its sides, as a run makes them: what is equal stands on one side, and is kept once."""

from __future__ import annotations

from typing import Any

import pytest

from upslope.config import load_recipe
from upslope.training.data import load_splits


class Accounts:
    """Takes what is told, as a run does."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.told: list[str] = []

    def account(self, text: str, stage: str | None = None, examples: Any = ()) -> None:
        self.told.append(text)


def sides(columns: dict[str, str], rows: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    stage = {"reward": {"steps": 1}} if "chosen" in columns else {"sft": {"steps": 1}}
    data = {"rows": "given", "valid": 0.3, "test": 0.3, **columns}
    book = Accounts(load_recipe({"model": "none", "data": data, **stage}))
    splits = load_splits(book, book.recipe.data, 1, rows)
    names = list(columns.values())
    return {side: [str([row[n] for n in names]) for row in found] for side, found in splits.items()}, book.told


@pytest.mark.parametrize("columns", [{"messages": "talk"}, {"chosen": "good", "rejected": "bad"}, {"text": "good"}])
def test_equal_rows_are_kept_once_and_so_stand_on_one_side(columns):
    rows = [
        {"talk": [{"role": "assistant", "content": f"number {n % 40}"}], "good": f"yes {n % 40}", "bad": f"no {n % 40}"}
        for n in range(120)
    ]
    found, told = sides(columns, rows)
    everything = [row for side in found.values() for row in side]
    assert len(everything) == len(set(everything)) == 40
    assert any("80 repeated" in line for line in told), told
