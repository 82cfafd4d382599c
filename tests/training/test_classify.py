"""An encoder as a policy of one action: labels learned by likelihood, then by reward, through whole runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

import upslope
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.config import Scratch, load_recipe
from upslope.errors import DataError, Interrupted, ModelError, RecipeError
from upslope.models.encoder import Encoder
from upslope.models.open import new_model
from upslope.observe.events import read_events
from upslope.text.examples import Example
from upslope.training.data import load_splits
from upslope.training.rehearse import Unrecorded
from upslope.training.supervised import choices

SHAPE = {"kind": "encoder", "width": 16, "layers": 1, "heads": 2, "context": 48, "vocab": 280}
WORDS = {"good": ["fine", "lovely", "warm"], "bad": ["dull", "weak", "grim"], "so-so": ["fair", "middling", "plain"]}


def labelled_rows(count=150):
    names = list(WORDS)
    return [
        {"text": f"a {WORDS[names[i % 3]][i // 3 % 3]} film, number {i}", "label": names[i % 3]} for i in range(count)
    ]


def recipe(**changes):
    base = {
        "model": SHAPE,
        "dtype": "fp32",
        "checkpoint_minutes": 0,
        "data": {"rows": "given", "text": "text", "classes": "label", "valid": 0.2, "test": 0.2, "max_tokens": 48},
        "optim": {"lr": 5e-3, "micro_tokens": 256},
        "sft": {"steps": 40, "batch": 16},
        "rl": {"reward": "tests.scores:right", "steps": 2, "prompts": 8, "max_tokens": 1},
        "eval": {"prompts": 6, "judges": []},
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def train(out, **changes):
    return upslope.train(recipe(**changes), rows=labelled_rows(), out=out, plain=True)


def metrics(run, stage):
    return json.loads((run / stage / "done.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("classify") / "run")


def test_labels_are_learned_and_counted_on_unseen_rows(finished):
    sft = metrics(finished, "sft")
    assert sft["valid/accuracy_before"] < 0.7 and sft["valid/accuracy"] > 0.9 and sft["valid/macro_f1"] > 0.9
    config = json.loads((finished / "sft" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "so-so"}
    model = upslope.load(finished / "sft" / "model", dtype="fp32")
    assert model.generate(["a lovely film, number 7", "a grim film, number 3"], temperature=0.0) == ["good", "bad"]
    with pytest.raises(ModelError, match=r"chooses among 3 labels and says nothing else; use generate"):
        model.chat([{"role": "user", "content": "a lovely film"}])


def test_a_run_folder_as_the_model_of_a_recipe_is_told_what_is_in_it(finished, tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json; name a model of that run: .*rl/model, .*sft/model"):
        train(tmp_path / "run", model=str(finished))


def test_an_episode_is_one_action_that_ends_it(finished):
    for line in (finished / "episodes.jsonl").read_text().splitlines():
        episode = json.loads(line)
        assert len(episode["actions"]) == 1 and episode["finish"] == "eos" and episode["completion"] in WORDS


def test_a_reward_alone_teaches_labels(tmp_path):
    rl = recipe()["rl"] | {"algorithm": "reinforce", "baseline": "mean", "steps": 60, "prompts": 32}
    run = train(tmp_path / "run", sft=None, rl=rl)
    reward = [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["kind"] == "step"]
    means = [e["metrics"]["reward/mean"] for e in reward]
    assert means[0] < 0.45 and sum(means[-5:]) / 5 > 0.65  # one in three by chance


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_c55_ppo_with_a_critic_is_resumed_bit_for_bit(critic, tmp_path, monkeypatch):
    changes = {"sft": {"steps": 2, "batch": 4}, "rl": recipe()["rl"] | {"algorithm": "ppo", "critic": critic}}
    whole = train(tmp_path / "whole", **changes)
    stopped = 0
    for at in (4, 12):
        with monkeypatch.context() as patch:
            stop_at_ask(patch, at)
            try:
                train(tmp_path / "broken", **changes)
            except Interrupted:
                stopped += 1
    train(tmp_path / "broken", **changes)
    assert stopped
    same(outcome(whole), outcome(tmp_path / "broken"))
    assert any(t.abs().max() > 0 for t in load_file(whole / "rl" / "critic.safetensors").values())


def test_accuracy_and_macro_f1_by_hand():
    model = new_model(Scratch(**SHAPE), 31, 0)
    assert isinstance(model, Encoder)
    model.take_labels(("a", "b", "c", "never"))
    with torch.no_grad():
        model.label_head.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -9.0]))  # always b
    examples = [Example([5, 6, label], [False, False, True], 0) for label in (0, 1, 1, 2)]
    found = choices(model, examples, 64)
    assert found["valid/accuracy"] == 0.5
    assert found["valid/macro_f1"] == pytest.approx((0 + 2 * 2 / (2 * 2 + 2) + 0) / 3)  # "never" has no part


def test_rows_of_a_label_that_the_training_side_lacks_are_dropped_and_counted(tmp_path):
    rows = labelled_rows()
    splits = load_splits(Unrecorded(made := load_recipe(recipe())), made.data, made.seed, rows)
    odd = {"valid": splits["valid"][3]["row_number"], "test": splits["test"][2]["row_number"]}
    for side, row in odd.items():
        rows[row]["label"] = f"odd of {side}"
    run = upslope.train(recipe(sft={"steps": 1}, rl=None), rows=rows, out=tmp_path / "run", plain=True)
    told = [e["text"] for e in read_events(run / "events.jsonl") if e["kind"] == "account"]
    for side, row in odd.items():
        reason = f"1 of label 'odd of {side}', which the training side lacks (first: row {row})"
        assert any(line.startswith(f"{side} rows: ") and reason in line for line in told), told
    with pytest.raises(DataError, match=r"row \d+ has \['good', 'bad'\] in column 'label', and a class is one label"):
        rows = [row | {"label": ["good", "bad"]} for row in labelled_rows()]
        upslope.train(recipe(), rows=rows, out=tmp_path / "lists", plain=True)


def weighted(weights, **task):
    task = {"prompt": "{text}", "reference": "label", "metrics": ["weighted_accuracy"], "weights": weights} | task
    data = {key: value for key, value in recipe()["data"].items() if key != "text"}
    rl = recipe()["rl"] | {"reward": "weighted_accuracy"}
    return {"task": task, "data": data, "rl": rl, "sft": {"steps": 2}, "eval": {"prompts": 6, "judges": []}}


def test_a_reward_may_pay_each_label_its_own_weight(tmp_path):
    run = train(tmp_path / "run", **weighted({"good": 8.0, "bad": 1.0, "so-so": 1.0}))
    episodes = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    paid = {}
    for e in episodes:
        if e["total"]:
            paid.setdefault(e["completion"], set()).add(round(e["total"], 6))
    assert len(paid["good"]) == 1 and paid["good"].pop() == pytest.approx(8 * paid["bad"].pop(), rel=1e-5)


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    with pytest.raises(DataError, match="the reference 'so-so' has rows and no weight on the training side"):
        train(tmp_path / "a", **weighted({"good": 8.0, "bad": 1.0}))
    with pytest.raises(RecipeError, match="is weighted_accuracy, which has no weights; set task"):
        train(tmp_path / "b", **weighted(None))
    with pytest.raises(RecipeError, match="weights are of references; set reference to their column"):
        train(tmp_path / "c", **weighted("balanced", reference=None))


def test_what_cannot_be_is_one_line(finished, model_dir, tmp_path):
    with pytest.raises(ModelError, match=r"data\.classes is set, and the model is no encoder"):
        train(tmp_path / "a", model=str(model_dir), sft={"steps": 1})
    with pytest.raises(ModelError, match="an encoder without labels chooses nothing and writes no text"):
        upslope.load(finished / "start" / "model")
    with pytest.raises(ModelError, match=r"chooses among 3 labels, the training side has 2; not in both: so-so"):
        upslope.train(
            recipe(sft={"steps": 1, "init": str(finished / "sft" / "model")}, rl=None),
            rows=[row for row in labelled_rows() if row["label"] != "so-so"], out=tmp_path / "b", plain=True,
        )  # fmt: skip
    with pytest.raises(RecipeError, match=r"rl\.max_tokens = 9, but a label of data\.classes is one"):
        train(tmp_path / "d", rl=recipe()["rl"] | {"max_tokens": 9})
    with pytest.raises(RecipeError, match="tied = false has no place in encoder"):
        upslope.train(recipe(model=SHAPE | {"tied": False}), rows=labelled_rows(), out=tmp_path / "c", plain=True)
