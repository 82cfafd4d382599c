"""What would fail at the end of a run fails before its first stage: nothing has been trained then."""

import json

import pytest

import upslope
from tests.conftest import make_rows
from upslope.config import Scratch
from upslope.errors import DataError, Interrupted, ModelError, RecipeError, RewardError, RunError
from upslope.models.open import new_model, save_model
from upslope.observe.events import read_events
from upslope.training import supervised
from upslope.training.run import Run

JUDGES = """
def raises(prompts, completions, rows):
    return [row["nothing"] for row in rows]

def short(prompts, completions, rows):
    return [1.0]

def words(prompts, completions, rows):
    return ["good" for _ in completions]

def half(prompts, completions, rows):
    return [float("nan") if n % 2 else 1.0 for n in range(len(completions))]
"""


@pytest.fixture
def short_recipe(recipe):
    """sft, then rl on a named metric, then the table."""
    del recipe["reward"]
    recipe["rl"] |= {"reward": "distinct_words", "steps": 1, "epochs": 1, "minibatches": 1}
    recipe["sft"]["steps"] = 1
    recipe["eval"] = {"prompts": 4, "judges": []}
    return recipe


@pytest.fixture
def judges(tmp_path):
    (tmp_path / "judges.py").write_text(JUDGES)
    return str(tmp_path / "judges.py")


def trained(folder):
    return [path.parent.name for path in folder.glob("*/model") if path.parent.name != "start"]


def refused(recipe, out, error, message, *over, rows=None):
    with pytest.raises(error, match=message) as caught:
        upslope.train(recipe, *over, rows=rows or make_rows(), out=out, plain=True)
    assert "\n" not in str(caught.value)
    assert not trained(out) and not list(out.glob("*/checkpoints"))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("JUDGES:raises", RewardError, "eval.judges: raises failed on each of the 8 .* KeyError: 'nothing'"),
        ("JUDGES:short", RewardError, "short returned 1 scores for 8"),
        ("JUDGES:words", RewardError, "eval.judges: words failed on each of the 8 .* returned 'good', not a number"),
        ("JUDGES:none", RewardError, "judges.py has no function 'none'; it has raises, short, words, half"),
        ("nowhere.at_all:f", RewardError, r"No module named 'nowhere'; name module:function"),
        ("language:xx", RewardError, "language 'xx' is none of"),
        ("likelihood:/nowhere", DataError, "no such file or folder: /nowhere"),
        ("stage:reward", RecipeError, r"eval.judges is stage:reward but there is no \[reward\] table"),
    ],
)
def test_a_judge_that_cannot_judge_is_told_before_anything_is_trained(
    short_recipe, judges, tmp_path, name, error, message
):
    short_recipe["eval"]["judges"] = [name.replace("JUDGES", judges)]
    refused(short_recipe, tmp_path / "run", error, message)


def test_a_judge_that_fails_here_and_there_judges(short_recipe, judges, tmp_path):
    short_recipe["eval"]["judges"] = [f"{judges}:half"]
    folder = upslope.train(short_recipe, rows=make_rows(), out=tmp_path / "run", plain=True)
    table = next(e for e in read_events(folder / "events.jsonl") if e["kind"] == "table" and e["stage"] == "eval")
    assert "failed, and in no mean: 2 of judge: half" in table["note"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"metrics": ["verifier"]}, r"task.metrics: verifier failed on each of the \d+ .* row \d+ is no puzzle"),
        ({"reference": "film", "metrics": ["rougeL"], "source": "text", "baseline": "copy"}, ""),
    ],
)
def test_a_metric_is_tried_on_rows_before_anything_is_trained(short_recipe, tmp_path, task, message):
    short_recipe["task"] = task
    if message:
        refused(short_recipe, tmp_path / "run", RewardError, message)
    else:
        assert set(trained(upslope.train(short_recipe, rows=make_rows(), out=tmp_path / "run", plain=True))) > {"rl"}


def test_later_stages_are_told_of_their_rows_and_models_before_the_first_trains(
    short_recipe, tmp_path, model_dir, tokenizer
):
    refused(short_recipe, tmp_path / "a", DataError, "exceeds the model's context of 64", "eval.max_tokens=62")
    refused(short_recipe, tmp_path / "b", DataError, "no such file or folder: /nowhere", "rl.init=/nowhere")
    refused(short_recipe, tmp_path / "e", RecipeError, "the model has 2 blocks", "rl.freeze_layers=3")
    rows = [row | {"text": row["text"] if row["film"] != "film 3" else "one two"} for row in make_rows()]
    refused(
        short_recipe,
        tmp_path / "c",
        DataError,
        "no prompts left of 85: with no more than 20 words",
        "data.prompt_words=20",
        rows=rows,
    )
    save_model(
        new_model(Scratch(kind="encdec", width=16, layers=1, heads=2, context=64), tokenizer.vocab_size, 0),
        tmp_path / "encdec",
    )
    refused(
        short_recipe,
        tmp_path / "d",
        ModelError,
        "encdec is an encoder-decoder, the recipe's model is a model without an encoder",
        f"rl.init={tmp_path / 'encdec'}",
    )


def test_a_baseline_that_answers_no_label_is_told_before_anything_is_trained(tmp_path):
    recipe = {
        "model": {"kind": "encoder", "width": 16, "layers": 1, "heads": 2, "context": 48, "vocab": 300},
        "dtype": "fp32",
        "data": {"rows": "given", "text": "text", "classes": "label", "max_tokens": 48, "valid": 0.2, "test": 0.2},
        "task": {"reference": "film", "metrics": ["accuracy"], "baseline": "majority"},
        "sft": {"steps": 1, "batch": 4},
        "eval": {"prompts": 4, "judges": []},
    }
    refused(recipe, tmp_path / "run", DataError, "the baseline answers 'film .*, which is no label; .*task.reference")


def test_an_answer_of_a_baseline_beyond_the_context_has_no_perplexity_and_stops_nothing(short_recipe, tmp_path):
    rows = [row | {"long": "words of it " * 30} for row in make_rows()]
    short_recipe["task"] = {"reference": "label", "source": "long", "metrics": ["rougeL"], "baseline": "copy"}
    folder = upslope.train(short_recipe, rows=rows, out=tmp_path / "run", plain=True)
    table = next(e for e in read_events(folder / "events.jsonl") if e["kind"] == "table" and e["stage"] == "eval")
    row = next(row for row in table["rows"] if row[0] == "perplexity, original model")
    assert row[1] == "-" and row[2] != "-"


def stopped_in_sft(recipe, folder, monkeypatch, rows):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervised, "export_policy", stop)
        upslope.train(recipe, rows=rows, out=folder, plain=True)
    assert list(folder.glob("sft/checkpoints/*"))


def test_what_the_table_alone_reads_may_change_when_a_run_carries_on(short_recipe, tmp_path, monkeypatch, rows):
    folder = tmp_path / "run"
    stopped_in_sft(short_recipe, folder, monkeypatch, rows)
    changes = ["eval.prompts=3", "eval.judges=['vader']", "limits.slots=8", "name=other"]
    for harmful in ("sft.steps=2", "seed=9", "eval.temperature=0.5", "data.valid=0.3"):
        with pytest.raises(RunError, match=f"another recipe: {harmful.partition('=')[0]}: .* choose another folder"):
            upslope.train(short_recipe, harmful, *changes, rows=rows, out=folder, plain=True)
    assert json.loads((folder / "recipe.json").read_text())["eval"]["prompts"] == 4
    upslope.train(short_recipe, *changes, rows=rows, out=folder, plain=True)
    events = read_events(folder / "events.jsonl")
    table = next(e for e in events if e["kind"] == "table" and e["stage"] == "eval")
    assert "3 held-out prompts" in table["note"] and [
        row[0] for row in table["rows"] if row[0].startswith("judge")
    ] == ["judge: vader"]
    assert any("the recipe has changed: eval.prompts: 4 there, 3 here" in e.get("text", "") for e in events)
    assert json.loads((folder / "recipe.json").read_text())["eval"]["prompts"] == 3
    with pytest.raises(RunError, match=r"eval.prompts: 3 there, 4 here; upslope eval makes the table .* again"):
        upslope.train(short_recipe, *changes[1:], rows=rows, out=folder, plain=True)


def test_a_reward_that_no_stage_asks_is_refused(short_recipe, rows, tmp_path):
    del short_recipe["rl"]
    with pytest.raises(RecipeError, match=r"no stage of the recipe asks one; add a table \[rl\] or \[expert\]"):
        upslope.train(short_recipe, reward=len, rows=rows, out=tmp_path / "run", plain=True)


def test_the_reward_model_may_be_a_metric_and_a_judge_that_the_rehearsal_waits_for(recipe, rows, tmp_path):
    recipe["rl"] |= {"steps": 1, "epochs": 1, "minibatches": 1, "reward": "distinct_words"}
    recipe |= {"sft": None, "task": {"metrics": ["stage:reward"]}, "eval": {"prompts": 4, "judges": ["stage:reward"]}}
    folder = upslope.train({k: v for k, v in recipe.items() if v}, rows=rows, out=tmp_path / "run", plain=True)
    table = next(e for e in read_events(folder / "events.jsonl") if e["kind"] == "table" and e["stage"] == "eval")
    assert {"task: learned", "judge: learned"} <= {row[0] for row in table["rows"]}


def test_a_stop_in_the_rehearsal_leaves_nothing_begun(short_recipe, rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="the same command carries on"):
        patch.setattr(Run, "should_stop", lambda self: True)
        upslope.train(short_recipe, rows=rows, out=tmp_path / "run", plain=True)
    assert not trained(tmp_path / "run") and not list((tmp_path / "run").glob("*/checkpoints"))
    assert set(trained(upslope.train(short_recipe, rows=rows, out=tmp_path / "run", plain=True))) == {"sft", "rl"}
