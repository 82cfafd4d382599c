"""[task] in whole runs: one table, its metrics on the way and at the end, baselines, and exact resume."""

import json

import numpy as np
import pytest

import upslope
from tests.conftest import make_recipe, make_rows
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.config import load_recipe
from upslope.errors import DataError, Interrupted, RecipeError
from upslope.observe.events import read_events
from upslope.text.baselines import copy, lead, majority
from upslope.training.closing import _comparison
from upslope.training.heldout import TaskMetrics
from upslope.training.parts import Given, Pipeline

WORDS = ["cat", "dog", "sun", "moon", "tree", "star", "fish", "bird"]


def make_task_rows(count=96):
    made = []
    for n in range(count):
        word = WORDS[n % len(WORDS)]
        made.append({"noun": f"{word} {n}", "upper": word.upper(), "kind": f"k{n // 4}"})
    return made


def task_recipe(model_dir, **changes):
    recipe = make_recipe(model_dir)
    recipe["data"] = {"rows": "given", "group": "kind", "valid": 0.2, "test": 0.2, "max_tokens": 60}
    recipe["task"] = {
        "prompt": "Shout: {noun}\n",
        "reference": "upper",
        "metrics": ["exact_match", "chrf", "ter", "distinct_1"],
        "baseline": "copy",
    }
    recipe["rl"] |= {"reward": "edit_similarity"}
    recipe["eval"] |= {"every": 2, "watched": 6}
    del recipe["reward"]
    return recipe | changes


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, model_dir):
    recipe = task_recipe(model_dir)
    recipe["expert"] = {
        "reward": "edit_similarity",
        "prompts": 8,
        "samples": 2,
        "steps": 2,
        "batch": 4,
        "max_tokens": 8,
    }
    folder = upslope.train(recipe, rows=make_task_rows(), out=tmp_path_factory.mktemp("task") / "run", plain=True)
    return recipe, folder, outcome(folder)


def test_one_table_makes_prompts_and_what_is_learned(unbroken):
    _, _, (_, events, episodes) = unbroken
    assert all(e["prompt"].startswith("Shout: ") and e["prompt"].endswith("\n") for e in episodes)
    assert not [e for e in events if e["kind"] == "account" and "malformed" in e["text"]]
    for e in episodes:
        assert e["rewards"].keys() == {"edit_similarity"} and e["total"] == e["rewards"]["edit_similarity"]


def test_the_task_is_measured_beside_the_reward_at_the_start_on_the_way_and_at_the_end(unbroken):
    _, _, (_, events, _) = unbroken
    found = [e for e in events if e["kind"] == "eval" and "task/chrf" in e["metrics"]]
    assert [(e["stage"], e["step"]) for e in found] == [("sft", 3), ("rl", 0), ("rl", 2), ("rl", 3), ("expert", 2)]
    for e in found:
        names = {n.removeprefix("task/") for n in e["metrics"] if n.startswith("task/")}
        assert {"exact_match", "chrf", "ter", "distinct_1"} <= names and ("reward" in names) == (e["stage"] == "rl")
        for name in ("chrf", "ter", "distinct_1"):
            low, value, high = (e["metrics"][f"task/{name}{end}"] for end in ("_low", "", "_high"))
            assert low <= value <= high


def test_the_closing_table_has_baseline_supervised_start_rl_and_expert(unbroken):
    _, folder, (_, events, _) = unbroken
    table = next(e for e in events if e["kind"] == "table" and e["stage"] == "eval")
    assert table["columns"] == ["", "baseline", "before", "after", "expert", "change"]
    assert "'before' is the model after sft; baseline: copy; temperature 1" in table["note"]
    closing = json.loads((folder / "eval" / "done.json").read_text())["metrics"]
    assert closing["task: exact_match"]["baseline"] == 0.0  # "cat 1" is not "CAT"
    assert closing["task: chrf"].keys() == {"baseline", "before", "after", "expert"}
    kl = next(row for row in table["rows"] if row[0].startswith("KL"))
    assert kl[1] == "-" and kl[2].startswith("0.00")
    assert closing["task: ter"]["baseline"] == 1.0  # one word too many for one word, whatever its case


def test_the_table_says_which_model_rl_began_with(model_dir):
    before = task_recipe(model_dir)
    own = {**before, "rl": before["rl"] | {"init": str(model_dir)}}
    notes = [
        _comparison(Pipeline(None, load_recipe(recipe), "none", None, {}, Given(), None), ["before", "after"]).note
        for recipe in (before, own)
    ]
    assert notes[0].startswith("'before' is the model after sft; ")
    assert notes[1].startswith(f"'before' is {model_dir}, rl.init; ")


@pytest.mark.parametrize("stop_at", [12, 16, 20, 26, 33, 41])
def test_c55_a_run_with_a_task_stopped_anywhere_ends_where_an_unbroken_one_ends(
    unbroken, tmp_path, monkeypatch, stop_at
):
    recipe, _, first = unbroken
    stop_at_ask(monkeypatch, stop_at)
    with pytest.raises(Interrupted, match="the same command"):
        upslope.train(recipe, rows=make_task_rows(), out=tmp_path / "run", plain=True)
    monkeypatch.undo()
    same(outcome(upslope.train(recipe, rows=make_task_rows(), out=tmp_path / "run", plain=True)), first)


def test_a_supervised_run_alone_is_compared_with_its_start_and_greedily_where_asked(model_dir, tmp_path):
    recipe = task_recipe(model_dir)
    del recipe["rl"]
    recipe["eval"] |= {"temperature": 0, "max_tokens": 6}
    recipe["task"]["baseline"] = "majority"
    folder = upslope.train(recipe, rows=make_task_rows(), out=tmp_path / "run", plain=True)
    table = next(e for e in read_events(folder / "events.jsonl") if e["kind"] == "table" and e["stage"] == "eval")
    assert table["title"] == "Held-out prompts, before and after sft" and "temperature 0" in table["note"]
    names = [row[0] for row in table["rows"]]
    assert "task: exact_match" in names and not [n for n in names if n.startswith("KL")]
    closing = json.loads((folder / "eval" / "done.json").read_text())["metrics"]
    count = int(table["note"].split()[0])
    assert closing["mean length, tokens"]["after"] <= 6
    assert closing["distinct-1"]["baseline"] == pytest.approx(1 / count)  # the same word for each


def test_rows_without_reference_or_source_are_dropped_with_their_number(model_dir, tmp_path):
    recipe = task_recipe(model_dir)
    del recipe["rl"]
    rows = make_task_rows()
    rows[5]["upper"], rows[7]["noun"], rows[9]["upper"] = "", "  ", None
    folder = upslope.train(recipe, "sft.steps=1", rows=rows, out=tmp_path / "run", plain=True)
    said = [e["text"] for e in read_events(folder / "events.jsonl") if e["kind"] == "account"]
    assert said[0] == "rows: 93 rows of 96; dropped: 2 without upper (first: row 5), 1 without noun (first: row 7)"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task.prompt": "Shout:\n"}, RecipeError, "names no column; write one in braces"),
        ({"task.prompt": "Shout: {noun"}, RecipeError, "is no template"),
        ({"task.prompt": "Shout: {0.x}"}, RecipeError, r"has a field \{0.x\}; write a column's name"),
        ({"task.prompt": "{noun} {upper}"}, RecipeError, "baseline = copy needs to know what it takes; set source"),
        ({"task.prompt": "Shout: {nuon}"}, DataError, "has no column 'nuon'; did you mean 'noun'"),
        ({"task.reference": "uper"}, DataError, "has no column 'uper'; did you mean 'upper'"),
        ({"data.prompt": "noun"}, RecipeError, "both say what a prompt is; remove one"),
        ({"task.metrics": ["chrff"]}, RecipeError, "is no metric; did you mean 'chrf'"),
    ],
)
def test_a_task_that_cannot_be_is_one_line(model_dir, tmp_path, changes, error, message):
    recipe = task_recipe(model_dir)
    for key, value in changes.items():
        table, _, name = key.partition(".")
        recipe[table][name] = value
    with pytest.raises(error, match=message):
        upslope.train(recipe, rows=make_task_rows(), out=tmp_path / "run", plain=True)


def test_a_resolved_recipe_reads_as_itself(model_dir):
    recipe = load_recipe(task_recipe(model_dir))
    assert recipe.data.prompt == "task_prompt" and recipe.data.completion == "upper"
    assert load_recipe(recipe.model_dump(mode="json")) == recipe


def test_baselines_by_hand():
    train = [{"reference": r} for r in ("a b", "c", ["a b", "x"], "d e f")]
    rows = [{"text": "one two three"}, {"text": "four"}]
    assert majority(train, rows, None, "reference") == ["a b", "a b"]
    assert copy(train, rows, "text", "reference") == ["one two three", "four"]
    assert lead(train, rows, "text", "reference") == ["one two", "four"]  # the median of 2, 1, 2, 3 words


def test_a_function_of_the_users_is_a_metric_and_its_failures_are_in_no_mean():
    class Half:
        name = "mine"

        def __call__(self, episodes, rows):
            return type("R", (), {"score_B": np.array([1.0, np.nan])})()

        def close(self):
            pass

    metrics = TaskMetrics(["m.py:mine"], lambda name: Half())
    measured = metrics([type("E", (), {"completion": "x"})()] * 2, [{}] * 2)
    assert measured.statistics()["mine"](np.arange(2)) == 1.0


def test_an_encoder_that_chooses_labels_is_measured_like_any_other(tmp_path):
    """One action, a label: accuracy and macro-F1 on the way and at the end, beside the majority."""
    recipe = {
        "model": {"kind": "encoder", "width": 16, "layers": 1, "heads": 2, "context": 64, "vocab": 300},
        "dtype": "fp32",
        "data": {"rows": "given", "prompt": "text", "classes": "label", "group": "film", "valid": 0.2, "test": 0.2},
        "task": {"reference": "label", "metrics": ["accuracy", "macro_f1"], "baseline": "majority"},
        "sft": {"steps": 2, "batch": 8},
        "rl": {"reward": "accuracy", "steps": 2, "prompts": 6, "max_tokens": 1, "minibatches": 2},
        "eval": {"prompts": 12, "judges": [], "every": 1, "watched": 8},
    }
    folder = upslope.train(recipe, rows=make_rows(), out=tmp_path / "run", plain=True)
    events = read_events(folder / "events.jsonl")
    measured = [e for e in events if e["kind"] == "eval" and "task/macro_f1" in e["metrics"]]
    assert [(e["stage"], e["step"]) for e in measured] == [("sft", 2), ("rl", 0), ("rl", 1), ("rl", 2)]
    closing = json.loads((folder / "eval" / "done.json").read_text())["metrics"]
    for column in ("before", "after", "baseline"):
        assert closing["task: accuracy"][column] == closing["reward: accuracy"][column]
    # always the same of two labels: one has recall 1 and the precision of its share, the other nothing
    share = closing["task: accuracy"]["baseline"]
    assert closing["task: macro_f1"]["baseline"] == pytest.approx(share / (1 + share))
