"""Runs that begin after the stages of another run end as if they had run them."""

import json

import pytest

import upslope
from tests.conftest import make_recipe
from tests.training.test_pipeline import outcome, same
from upslope.config import load_recipe
from upslope.errors import RunError
from upslope.training.share import begin_from, common_stages


@pytest.fixture(scope="module")
def first(tmp_path_factory, model_dir, rows):
    out = tmp_path_factory.mktemp("sweep") / "lam=0.5"
    return upslope.train(make_recipe(model_dir), "rl.lam=0.5", "rl.steps=2", rows=rows, out=out, plain=True)


def test_a_run_that_shares_stages_is_bit_for_bit_a_whole_one(first, recipe, rows):
    changes = ["rl.lam=0.9", "rl.steps=2"]
    folder, table = first.parent / "lam=0.9", load_recipe(recipe, changes).model_dump(mode="json")
    said = begin_from([first], folder, table)
    assert said == "sft, reward: taken from lam=0.5, where nothing before them was set otherwise"
    one, two = (path / "sft" / "model" / "model.safetensors" for path in (first, folder))
    assert one.stat().st_ino == two.stat().st_ino  # no second copy on the disk
    upslope.train(recipe, *changes, rows=rows, out=folder, plain=True)
    upslope.train(recipe, *changes, rows=rows, out=first.parent / "whole", plain=True)
    weights, events, episodes = outcome(folder)
    told = [event for event in events if event.get("text") == said]
    assert len(told) == 1 and events[0]["recipe"]["rl"]["lam"] == 0.9
    same((weights, [event for event in events if event is not told[0]], episodes), outcome(first.parent / "whole"))
    assert begin_from([first], folder, table) == ""  # a run that has begun is left alone


def test_stages_that_were_learned_from_other_rows_are_not_gone_on_from(first, recipe, rows):
    folder, table = first.parent / "fewer", load_recipe(recipe, ["rl.lam=0.7"]).model_dump(mode="json")
    assert begin_from([first], folder, table)
    with pytest.raises(RunError, match="fewer was begun with other rows"):
        upslope.train(recipe, "rl.lam=0.7", rows=rows[:72], out=folder, plain=True)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        (["rl.lam=0.1"], ["sft", "reward"]),
        (["eval.prompts=3", "name=other", "checkpoint_minutes=9"], ["sft", "reward"]),
        (["rl.optim.lr=1e-4"], ["sft", "reward"]),
        (["reward.steps=4"], ["sft"]),
        (["sft.steps=4"], []),
        (["optim.lr=1e-4"], []),
        (["seed=4"], []),
        (["data.min_chars=2"], []),
        (["dtype=bf16"], []),
    ],
)
def test_only_stages_that_were_set_alike_are_shared(first, recipe, changes, stages):
    assert common_stages(first, load_recipe(recipe, changes).model_dump(mode="json")) == stages


def test_an_unfinished_stage_or_a_single_one_is_not_shared(first, recipe, tmp_path):
    table = load_recipe(recipe).model_dump(mode="json")
    (tmp_path / "recipe.json").write_text(json.dumps(table))
    assert common_stages(tmp_path, table) == [] and begin_from([tmp_path], tmp_path / "new", table) == ""
    del recipe["reward"], recipe["rl"]
    assert common_stages(first, load_recipe(recipe).model_dump(mode="json")) == []
