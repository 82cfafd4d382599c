"""From a recipe's rows to its sides, as a run makes them: what is equal stands on one side, and is kept once."""

from __future__ import annotations

from typing import Any

import pytest

from upslope.config import load_recipe
from upslope.config.recipe import PROMPT
from upslope.training.data import load_splits


class Accounts:
    """Takes what is told, as a run does."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        self.told: list[str] = []

    def account(self, text: str, stage: str | None = None, examples: Any = ()) -> None:
        self.told.append(text)


def sides(columns: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    stage = {"reward": {"steps": 1}} if "chosen" in columns else {"sft": {"steps": 1}}
    data = {"rows": "given", "valid": 0.3, "test": 0.3, **columns}
    book = Accounts(load_recipe({"model": "none", "data": data, **stage}))
    splits = load_splits(book, book.recipe.data, 1, rows)
    names = [name for name in columns.values() if name in rows[0]]
    return {side: [str([row[n] for n in names]) for row in found] for side, found in splits.items()}, book.told


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": "talk"},
        {"chosen": "good", "rejected": "bad"},
        {"text": "good"},
        {"prompt": "good", "completion": "bad"},
    ],
)
def test_equal_rows_are_kept_once_and_so_stand_on_one_side(columns):
    rows = [
        {"talk": [{"role": "assistant", "content": f"number {n % 40}"}], "good": f"yes {n % 40}", "bad": f"no {n % 40}"}
        for n in range(120)
    ]
    found, told = sides(columns, rows)
    everything = [row for side in found.values() for row in side]
    assert len(everything) == len(set(everything)) == 40
    assert any("80 repeated" in line for line in told), told


def test_what_is_learned_from_is_measured_whatever_it_is_made_of():
    talk = [{"talk": [{"role": "assistant", "content": "x" * n}]} for n in range(1, 61)]
    found, told = sides({"messages": "talk", "max_chars": 20}, talk)
    assert sum(map(len, found.values())) == 20 and "40 outside 1 to 20 characters (first: row 20)" in told[0]
    asked = [{"q": "?" * n, "a": f"{n}"} for n in range(60)]
    found, told = sides({"prompt": "q", "completion": "a", "min_chars": 10}, asked)
    assert sum(map(len, found.values())) == 51  # a prompt may be empty: what is learned is the completion
    assert "9 outside 10 to 100000 characters (first: row 1)" in told[0]


def test_a_row_without_its_group_is_dropped_and_counted():
    rows = [{"text": f"number {n}", "film": None if n % 2 else f"film {n}"} for n in range(60)]
    found, told = sides({"text": "text", "group": "film"}, rows)
    assert sum(map(len, found.values())) == 30 and "30 without film (first: row 1)" in told[0]


def test_prompts_alone_are_repeated_only_where_all_of_a_row_is():
    """What else a row holds may be what a reward function looks at."""
    recipe = load_recipe(
        {
            "model": "none",
            "data": {"rows": "given", "prompt": "q", "valid": 0.3, "test": 0.3},
            "rl": {"reward": "a:b", "max_tokens": 4},
        }
    )
    rows = [{"q": f"ask {n % 30}", "wanted": n // 60} for n in range(120)]
    splits = load_splits(book := Accounts(recipe), recipe.data, 1, rows)
    assert sum(map(len, splits.values())) == 60 and "60 repeated" in book.told[0]


@pytest.mark.parametrize("name", ["answer", "reference"])
def test_a_reference_may_be_a_number_whatever_its_column_is_called(name):
    recipe = load_recipe(
        {
            "model": "none",
            "data": {"rows": "given", "valid": 0.3, "test": 0.3},
            "task": {"prompt": "{q}", "reference": name, "metrics": ["exact_match"]},
            "sft": {"steps": 1},
        }
    )
    rows = [{"q": f"ask {n}", name: None if n == 7 else n} for n in range(60)]
    splits = load_splits(book := Accounts(recipe), recipe.data, 1, rows)
    assert {row["reference"] for side in splits.values() for row in side} == {str(n) for n in range(60) if n != 7}
    assert f"1 without {name} (first: row 7)" in book.told[0]


def test_labels_need_no_side_that_nothing_is_measured_on():
    data = {"rows": "given", "text": "t", "classes": "label", "valid": 0.0, "test": 0.3}
    rl = {"reward": "a:b", "max_tokens": 1}
    recipe = load_recipe({"model": "none", "data": data, "rl": rl})
    rows = [{"t": f"text {n}", "label": "ab"[n % 2]} for n in range(60)]
    assert len(load_splits(Accounts(recipe), recipe.data, 1, rows)["valid"]) == 0


def test_a_template_takes_numbers_and_columns_that_are_called_numbers():
    recipe = load_recipe(
        {
            "model": "none",
            "data": {"rows": "given", "valid": 0.3, "test": 0.3},
            "task": {"prompt": "{0} squared is ", "reference": "square", "metrics": ["exact_match"]},
            "sft": {"steps": 1},
        }
    )
    rows = [{"0": n, "square": n * n} for n in range(60)]
    splits = load_splits(book := Accounts(recipe), recipe.data, 1, rows)
    assert "60 rows of 60; nothing dropped" in book.told[0]
    assert {row[PROMPT] for side in splits.values() for row in side} == {f"{n} squared is " for n in range(60)}
