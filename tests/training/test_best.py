"""The best model of a stage: found, kept, handed on, by the metric that is asked for; and stages that end early."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import upslope
from tests.checkpoints import names, newest, save
from tests.scores import count_vowels
from upslope.checkpoint import checkpoint_at
from upslope.config import load_recipe, may_change
from upslope.errors import RecipeError, RunError
from upslope.observe.events import read_events
from upslope.training import preference, supervised
from upslope.training.heldout import Watched
from upslope.training.share import common_stages


def train(recipe, rows, out, *over, **options):
    return upslope.train(recipe, *over, rows=rows, out=out, plain=True, **options)


def weights(run, stage):
    return {
        f"{path.name} {name}": tensor
        for path in sorted((run / stage).rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same_weights(one, other, stage):
    a, b = weights(one, stage), weights(other, stage)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def events(run, kind, stage):
    return [e for e in read_events(run / "events.jsonl") if e["kind"] == kind and e.get("stage") == stage]


def closing(run, stage):
    return json.loads((run / stage / "done.json").read_text())["metrics"]


def measured_as(monkeypatch, module, name, values):
    """What is measured, in turn, in the place of a loop's own figures: metric -> values."""
    inner, calls = getattr(module, name), []

    def measure(*args, **options):
        found = inner(*args, **options)
        calls.append(1)
        return found | {metric: told[len(calls) - 1] for metric, told in values.items()}

    monkeypatch.setattr(module, name, measure)


@pytest.fixture
def sft(recipe):
    del recipe["reward"], recipe["rl"]
    recipe["sft"] |= {"steps": 5, "eval_every": 1, "best_by": "valid/loss"}
    return recipe


def test_the_best_of_a_supervised_stage_is_what_that_many_steps_alone_make(sft, rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        measured_as(patch, supervised, "evaluate", {"valid/loss": [3.0, 2.5, 2.0, 2.2, math.nan, 2.0]})
        run = train(sft, rows, tmp_path / "best")
    assert len(events(run, "step", "sft")) == 5
    found = closing(run, "sft")
    assert (found["best/step"], found["valid/loss"], found["valid/loss_before"]) == (2.0, 2.0, 3.0)  # the first of two
    sft["sft"] = {"steps": 2, "batch": 4}
    assert same_weights(run, train(sft, rows, tmp_path / "two"), "sft")
    said = [e["text"] for e in events(run, "account", "sft")]
    assert "sft: hands on the model after step 2, valid/loss 2" in said
    assert not (run / "sft" / "checkpoints").exists()


def test_patience_ends_a_stage_after_so_many_measurements_without_a_better_one(sft, rows, tmp_path, monkeypatch):
    measured_as(monkeypatch, supervised, "evaluate", {"valid/loss": [3.0, 2.0, 2.5, 1.9, 1.9, 1.95, 0.0]})
    run = train(sft, rows, tmp_path / "run", "sft.steps=12", "sft.eval_every=2", "sft.patience=2")
    assert [e["step"] for e in events(run, "step", "sft")] == list(range(1, 11))
    assert closing(run, "sft")["best/step"] == 6.0
    assert "sft: ends after step 10 of 12, valid/loss no better 2 times" in [
        e["text"] for e in events(run, "account", "sft")
    ]


def test_a_start_that_is_never_bettered_is_handed_on(sft, rows, model_dir, tmp_path, monkeypatch):
    measured_as(monkeypatch, supervised, "evaluate", {"valid/loss": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    run = train(sft, rows, tmp_path / "run")
    start, end = (load_file(folder / "model.safetensors") for folder in (model_dir, run / "sft" / "model"))
    assert all(torch.equal(start[name], end[name]) for name in start) and closing(run, "sft")["best/step"] == 0.0


def test_without_the_key_everything_is_as_before(recipe, rows, tmp_path):
    del recipe["reward"], recipe["rl"]
    often = train(recipe, rows, tmp_path / "often", "sft.eval_every=1")
    assert [e["step"] for e in events(often, "eval", "sft")] == [0, 1, 2, 3]
    plain = train(recipe, rows, tmp_path / "plain")
    assert [e["step"] for e in events(plain, "eval", "sft")] == [0, 3]
    assert same_weights(often, plain, "sft") and "best/step" not in closing(often, "sft")


def test_a_reward_model_is_chosen_by_its_margin_and_scaled_as_it_is(recipe, rows, tmp_path, monkeypatch):
    del recipe["sft"], recipe["rl"]
    recipe["reward"] |= {"steps": 4, "eval_every": 1, "best_by": "valid/margin"}
    with monkeypatch.context() as patch:
        measured_as(patch, preference, "measure", {"valid/margin": [9.0, 0.1, 0.5, 0.4, 0.3]})  # its start is no model
        run = train(recipe, rows, tmp_path / "best")
    assert closing(run, "reward")["best/step"] == 2.0
    recipe["reward"] = {"steps": 2, "batch": 4}
    assert same_weights(run, train(recipe, rows, tmp_path / "two"), "reward")


def test_rl_hands_on_policy_and_critic_of_the_best_rollout_and_ends_early(recipe, rows, tmp_path, monkeypatch):
    del recipe["sft"], recipe["reward"]
    recipe["rl"] |= {"steps": 9, "best_by": "task/reward", "patience": 2}
    recipe["eval"] |= {"every": 1, "watched": 4}
    inner, told = Watched.measure, [0.1, 0.5, 0.3, 0.2, 9.0]

    def measure(self, run, stage, step, *args):
        found, scores = inner(self, run, stage, step, *args)
        return found | {"task/reward": told[step]}, scores

    with monkeypatch.context() as patch:
        patch.setattr(Watched, "measure", measure)
        run = train(recipe, rows, tmp_path / "best", reward=count_vowels)
    assert [e["step"] for e in events(run, "step", "rl")] == [1, 2, 3]
    assert closing(run, "rl")["best/step"] == 1.0 and closing(run, "rl")["task/reward"] == 0.5
    del recipe["rl"]["best_by"], recipe["rl"]["patience"]
    one = train(recipe, rows, tmp_path / "one", "rl.steps=1", reward=count_vowels)
    assert any("critic" in name for name in weights(one, "rl")) and same_weights(run, one, "rl")


def test_less_is_better_of_losses_and_of_metrics_that_fall(recipe, rows, tmp_path, monkeypatch):
    del recipe["sft"], recipe["reward"]
    recipe["task"] = {"reference": "text", "metrics": ["ter"]}
    recipe["rl"] |= {"steps": 2, "best_by": "task/ter"}
    recipe["eval"] |= {"every": 1, "watched": 4}
    inner, told = Watched.measure, [0.5, 0.3, 0.7]

    def measure(self, run, stage, step, *args):
        found, scores = inner(self, run, stage, step, *args)
        return found | {"task/ter": told[step]}, scores

    monkeypatch.setattr(Watched, "measure", measure)
    assert closing(train(recipe, rows, tmp_path / "run", reward=count_vowels), "rl")["best/step"] == 1.0


def test_a_best_model_that_is_damaged_is_an_alarm_and_the_last_is_handed_on(sft, rows, tmp_path, monkeypatch):
    measured_as(monkeypatch, supervised, "evaluate", {"valid/loss": [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]})
    inner = supervised.supervised_step

    def damaging(run, state, cfg, batch):
        if state.step == 4:
            path = state.checkpoints(run) / "step-00000001" / "model.safetensors"
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return inner(run, state, cfg, batch)

    monkeypatch.setattr(supervised, "supervised_step", damaging)
    run = train(sft, rows, tmp_path / "run")
    told = events(run, "alarm", "sft")
    assert [(e["name"], e["step"]) for e in told] == [("best_lost", 1)] and "checksum" in told[0]["message"]
    assert closing(run, "sft")["valid/loss"] == 2.0 and "best/step" not in closing(run, "sft")
    sft["sft"] = {"steps": 5, "batch": 4}
    monkeypatch.undo()
    assert same_weights(run, train(sft, rows, tmp_path / "five"), "sft")


def test_a_checkpoint_is_kept_as_long_as_one_that_calls_it_the_best(tmp_path):
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
        save(tmp_path, step, best=best)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    save(tmp_path, 6, best=6)
    save(tmp_path, 7, best=6)
    save(tmp_path, 8, best=6)
    assert names(tmp_path) == ["step-00000006", "step-00000007", "step-00000008"]
    save(tmp_path, 9, best=9)  # were it damaged, step 8 would go on, whose best is step 6
    assert names(tmp_path) == ["step-00000006", "step-00000008", "step-00000009"]
    (tmp_path / "step-00000009" / "model.safetensors").write_bytes(b"")
    assert newest(tmp_path) == 8
    assert checkpoint_at(tmp_path, 6).step == 6
    with pytest.raises(RunError, match=r"step-00000009: model\.safetensors has 0 bytes"):
        checkpoint_at(tmp_path, 9)
    with pytest.raises(RunError, match="step-00000007: is missing"):
        checkpoint_at(tmp_path, 7)


def test_a_run_that_an_older_version_began_carries_on(recipe, rows, tmp_path):
    """Its recipe.json does not know the keys; they then stand at their defaults."""
    del recipe["reward"], recipe["rl"]
    run = train(recipe, rows, tmp_path / "run")
    old = json.loads((run / "recipe.json").read_text())
    for key in ("best_by", "eval_every", "patience"):
        del old["sft"][key]
    (run / "recipe.json").write_text(json.dumps(old))
    assert train(recipe, rows, tmp_path / "run") == run
    with pytest.raises(RunError, match=r"another recipe: sft\.eval_every: 0 there, 1 here"):
        train(recipe, rows, tmp_path / "run", "sft.eval_every=1")


def test_how_often_rl_is_measured_stays_where_that_chooses_its_best(recipe, rows, tmp_path):
    assert may_change("eval.every", closed=False) and not may_change("eval.every", closed=False, best=True)
    del recipe["sft"], recipe["reward"]
    recipe["rl"] |= {"steps": 1, "best_by": "task/reward"}
    run = train(recipe, rows, tmp_path / "run", reward=count_vowels)
    (run / "eval" / "done.json").unlink()
    with pytest.raises(RunError, match=r"another recipe: eval\.every: 10 there, 1 here; choose another folder"):
        train(recipe, rows, tmp_path / "run", "eval.every=1", reward=count_vowels)
    with pytest.raises(RecipeError, match=r"data\.valid = 0 leaves \[rl\] no rows to be watched by"):
        train(recipe, rows, tmp_path / "other", "data.valid=0", reward=count_vowels)


def test_a_sweep_shares_no_stage_that_was_chosen_by_other_measurements(recipe, tmp_path):
    recipe["rl"] |= {"best_by": "task/reward"}
    recipe["expert"] = {"reward": "vader", "steps": 1, "max_tokens": 8}
    table = load_recipe(recipe).model_dump(mode="json")
    (tmp_path / "recipe.json").write_text(json.dumps(table))
    for stage in ("sft", "reward", "rl"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "done.json").write_text("{}")
    assert common_stages(tmp_path, table) == ["sft", "reward", "rl"]
    other = load_recipe(recipe, ["eval.watched=3"]).model_dump(mode="json")
    assert common_stages(tmp_path, other) == []
    for one in (table, other):
        one["rl"]["best_by"] = None
    (tmp_path / "recipe.json").write_text(json.dumps(table))
    assert common_stages(tmp_path, other) == ["sft", "reward", "rl"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sft.best_by=valid/los", "is not measured here: choose one of valid/loss"),
        ("sft.best_by=valid/loss", "eval_every = 0 measures none on the way; set eval_every"),
        ("sft.patience=3", "patience = 3 waits for a better model and best_by is not set; set best_by"),
        ("reward.best_by=valid/loss", "choose one of valid/pair_accuracy, valid/margin"),
        ("rl.best_by=task/chrf", "is not measured and better one way; choose from task/reward"),
        ("rl.best_by=task/length_words", "is not measured and better one way"),
        ("rl.patience=2", "waits for a better model; set rl.best_by"),
    ],
)
def test_what_cannot_be_is_told_when_the_recipe_is_read(recipe, key, message):
    recipe["task"] = {"metrics": ["length_words"]}
    with pytest.raises(RecipeError, match=message.replace("here: ", "here; ")):
        upslope.train(recipe, key, rows=[], plain=True)


def test_labels_are_a_condition_of_their_metrics_and_an_evaluation_of_the_best_of_rl(recipe):
    with pytest.raises(RecipeError, match=r"sft\.best_by = 'valid/accuracy' is measured of labels and sft has none"):
        upslope.train(recipe, "sft.eval_every=1", "sft.best_by=valid/accuracy", rows=[], plain=True)
    with pytest.raises(RecipeError, match=r"eval\.every = 0 measures none; set eval\.every"):
        upslope.train(recipe, "rl.best_by=task/reward", "eval.every=0", rows=[], plain=True)
