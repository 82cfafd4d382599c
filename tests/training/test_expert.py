"""Back to supervision: what is kept, what is learned of it, and that a stop anywhere changes nothing."""

import itertools
import json

import numpy as np
import pytest
import torch

import upslope
from tests.conftest import make_recipe
from tests.scores import plain_start
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.config import Expert
from upslope.errors import DataError, Interrupted, RecipeError, RewardError, RunError
from upslope.observe.events import read_events
from upslope.ragged import Ragged
from upslope.rewards.types import RewardOutput
from upslope.training import expert
from upslope.training.episode import Episode
from upslope.training.expert import best_of, examples_of, mark_best
from upslope.training.scoring import LearnedSource, Scorer


def episode(group, sample, total, *, finish="eos", failure=None):
    return Episode("p", "c", [7, 8, 1, 2], [2, 3], [-1.0, -1.0], finish, 0, group, sample, total=total, failure=failure)


def test_the_best_of_n_is_the_mean_maximum_over_all_subsets():
    scores = [0.5, -1.0, 2.0, 2.0, 0.1]
    for n in range(1, 6):
        subsets = [max(s) for s in itertools.combinations(scores, n)]
        assert best_of(scores, n) == pytest.approx(np.mean(subsets))
    with pytest.raises(ValueError, match="best of 3 from 2 scores"):
        best_of([1.0, 2.0], 3)


def test_the_best_of_n_is_unbiased():
    """Over all draws of 4 from a known law, its mean is the exact E[max of 2]."""
    law, values = {0.0: 0.5, 1.0: 0.3, 3.0: 0.2}, [0.0, 1.0, 3.0]
    weight = lambda draw: np.prod([law[x] for x in draw])
    exact = sum(weight(d) * max(d) for d in itertools.product(values, repeat=2))
    found = sum(weight(d) * best_of(d, 2) for d in itertools.product(values, repeat=4))
    assert found == pytest.approx(exact)


def test_c54_the_best_are_kept_ties_by_number_and_failures_never():
    episodes = [
        episode(0, 0, 1.0),
        episode(0, 1, 2.0),
        episode(0, 2, 2.0),
        episode(0, 3, None, failure="broke"),
        episode(1, 0, -1.0),
        episode(1, 1, -2.0),
    ]
    mark_best(episodes, 1, None)
    assert [e.used for e in episodes] == [False, True, False, False, True, False]
    mark_best(episodes, 3, 0.0)
    assert [e.used for e in episodes] == [True, True, True, False, False, False]


class FakeRun:
    said = []

    @classmethod
    def account(cls, text, stage):
        cls.said.append(text)


def test_completions_are_learned_with_their_end_and_cut_ones_without_and_all_are_counted():
    episodes = [
        episode(0, 0, 1.0),
        episode(0, 1, 0.4),
        episode(1, 0, 0.9, finish="length"),
        episode(1, 1, None, failure="broke"),
        episode(2, 0, 0.1),
        episode(2, 1, 0.0),
    ]
    cfg = Expert(keep=1, samples=2, min_score=0.2)
    mark_best(episodes, 1, cfg.min_score)
    examples = examples_of(FakeRun, cfg, episodes, "train")
    assert [(e.ids, e.trained, e.row) for e in examples] == [
        ([7, 8, 1, 2], [False, False, True, True], 0),
        ([7, 8, 1, 2], [False, False, True, True], 1),
    ]
    assert FakeRun.said == [
        "train samples: 2 samples of 6; dropped: 1 not among the best 1 of a prompt (first: row 1), "
        "1 whose reward failed (first: row 3), 2 below 0.2 (first: row 4); "
        "1 of the kept cut by max_tokens, learned without an end"
    ]


def back_recipe(model_dir):
    """SL -> samples -> SL, chosen by a learned reward: no worker process has to start."""
    recipe = make_recipe(model_dir)
    recipe["sft"]["steps"] = recipe["reward"]["steps"] = 1
    recipe["expert"] = {"prompts": 8, "samples": 4, "keep": 2, "max_tokens": 8, "steps": 3, "batch": 4}
    recipe["expert"]["reward"] = "stage:reward"
    del recipe["rl"]
    return recipe


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, model_dir, rows):
    recipe = back_recipe(model_dir)
    folder = upslope.train(recipe, rows=rows, out=tmp_path_factory.mktemp("runs") / "unbroken", plain=True)
    return recipe, folder, outcome(folder), (folder / "expert" / "samples.jsonl").read_bytes()


def test_the_loop_from_supervision_to_reinforcement_and_back(model_dir, rows, tmp_path):
    recipe = back_recipe(model_dir)
    del recipe["expert"]["reward"]  # rl's, then
    recipe["rl"] = {"reward": "stage:reward", "steps": 1, "prompts": 6, "max_tokens": 8, "minibatches": 1}
    recipe["eval"] |= {"judges": []}
    folder = upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    weights, events, _ = outcome(folder)
    assert set(weights) == {"sft", "reward", "rl", "expert"}
    stages = [e["stage"] for e in events if e["kind"] == "stage"]
    assert stages == ["sft", "reward", "rl", "expert"]
    samples = read_events(folder / "expert" / "samples.jsonl")
    policy = upslope.load(folder / "rl" / "model", dtype="fp32")  # they are rl's: its own log-probabilities say so
    first = samples[0]
    again = policy.model.hidden(Ragged.of([first["ids"]]))
    logp = torch.log_softmax(again @ policy.model.output_weight.t(), dim=-1)
    of_actions = [logp[a - 1, first["ids"][a]].item() for a in first["actions"]]
    assert of_actions == pytest.approx(first["logp"], abs=1e-3)
    assert upslope.load(folder, dtype="fp32").source == str(folder / "expert" / "model")


def test_what_was_sampled_kept_and_told_agree(unbroken):
    _, folder, (_, events, _), _ = unbroken
    samples = read_events(folder / "expert" / "samples.jsonl")
    assert len(samples) == (8 + 1) * 4  # and one held-out prompt to watch by
    groups = [samples[i : i + 4] for i in range(0, len(samples), 4)]
    for number, group in enumerate(groups):
        assert [s["sample"] for s in group] == [0, 1, 2, 3] and {s["group"] for s in group} == {number}
        best = sorted(group, key=lambda s: (-s["total"], s["sample"]))[:2]
        assert [s["sample"] for s in group if s["used"]] == sorted(s["sample"] for s in best)
    tables = [e for e in events if e["kind"] == "table" and e["stage"] == "expert"]
    assert [t["title"] for t in tables] == ["expert: what choosing gains", "expert: held-out loss"]
    found = {row[0]: float(row[1].split()[0]) for row in tables[0]["rows"]}
    means = [np.mean([s["total"] for s in group]) for group in groups[:8]]
    assert found["one sample"] == pytest.approx(np.mean(means), abs=6e-4)
    maxima = [max(s["total"] for s in group) for group in groups[:8]]
    assert found["best of 4"] == pytest.approx(np.mean(maxima), abs=6e-4)
    assert found["one sample"] <= found["best of 2"] <= found["best of 4"] and found["one sample"] < found["kept"]


def test_what_is_sampled_is_of_the_policy_before_and_what_is_fitted_can_be_another(unbroken, rows, tmp_path):
    recipe, folder, _, samples = unbroken
    expert_table = recipe["expert"] | {"init": recipe["model"]}
    folder = upslope.train(recipe | {"expert": expert_table}, rows=rows, out=tmp_path / "run", plain=True)
    assert (folder / "expert" / "samples.jsonl").read_bytes() == samples
    weights = outcome(folder)[0]["expert"]
    assert any(not np.array_equal(weights[n], t) for n, t in unbroken[2][0]["expert"].items())


# 23 to 30: the samples, token by token; 31 and 32: their scores; 33 to 36: the fit, between two looks at unseen ones
@pytest.mark.parametrize("stop_at", [23, 28, 32, 33, 35, 36])
def test_c55_an_expert_stage_stopped_anywhere_ends_where_an_unbroken_one_ends(
    unbroken, rows, tmp_path, monkeypatch, stop_at
):
    recipe, _, first, samples = unbroken
    stop_at_ask(monkeypatch, stop_at)
    with pytest.raises(Interrupted, match="the same command"):
        upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    monkeypatch.undo()
    folder = upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    same(outcome(folder), first)
    assert (folder / "expert" / "samples.jsonl").read_bytes() == samples


@pytest.mark.parametrize("name", ["atomic_write_text", "record_best_of", "run_supervised"])
def test_c55_a_crash_around_the_samples_repeats_and_samples_no_second_time(unbroken, rows, tmp_path, monkeypatch, name):
    recipe, _, first, samples = unbroken

    def crash(*args, **options):
        raise MemoryError("made up")

    monkeypatch.setattr(expert, name, crash)
    with pytest.raises(MemoryError):
        upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    monkeypatch.undo()
    if name != "atomic_write_text":  # they are written: nothing may sample again
        monkeypatch.setattr(expert, "generate", crash)
    folder = upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    same(outcome(folder), first)
    assert (folder / "expert" / "samples.jsonl").read_bytes() == samples


def test_samples_of_another_recipe_are_not_taken_up(recipe, rows, tmp_path, monkeypatch):
    del recipe["sft"], recipe["reward"], recipe["rl"]
    recipe["expert"] = {"prompts": 4, "samples": 2, "max_tokens": 4, "steps": 1, "reward": "builtins:len"}
    monkeypatch.setattr(Scorer, "score", lambda self, episodes, rows: [setattr(e, "total", 1.0) for e in episodes])
    monkeypatch.setattr(expert, "run_supervised", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    with pytest.raises(RunError, match=r"another recipe: expert\.temperature"):
        upslope.train(recipe, "expert.temperature=0.5", rows=rows, out=tmp_path / "run", plain=True)


def test_a_model_learns_what_was_kept_without_any_rl(recipe, rows, tmp_path):
    del recipe["sft"], recipe["reward"], recipe["rl"]
    recipe["checkpoint_minutes"] = 60
    recipe["optim"]["lr"] = 1e-2
    recipe["expert"] = {"prompts": 60, "samples": 16, "keep": 8, "max_tokens": 1, "steps": 80, "batch": 32}
    recipe["expert"]["min_score"] = 0.5
    folder = upslope.train(recipe, reward=plain_start, rows=rows, out=tmp_path / "run", plain=True)
    samples = read_events(folder / "expert" / "samples.jsonl")
    before = np.mean([s["total"] for s in samples])
    model = upslope.load(folder, dtype="fp32")
    prompts = sorted({s["prompt"] for s in samples})[:20]
    after = np.mean(plain_start([], model.generate(prompts, max_tokens=1, samples=8), []))
    assert before < 0.6 and after > 0.9, (before, after)


def test_too_many_failures_stop_the_stage(model_dir, rows, tmp_path, monkeypatch):
    def all_but_one_fail(self, episodes, rows):
        return RewardOutput(np.full(len(episodes), 1.0), [None] + ["broke"] * (len(episodes) - 1))

    monkeypatch.setattr(LearnedSource, "__call__", all_but_one_fail)
    with pytest.raises(RewardError, match="35 of 36 rewards failed, the first with learned: broke") as caught:
        upslope.train(back_recipe(model_dir), rows=rows, out=tmp_path / "run", plain=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "expert" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("over", "error", "message"),
    [
        (["expert.min_score=99"], DataError, "none of 32 train samples was kept; the best score was .*"),
        (["expert.keep=5"], RecipeError, "keep = 5 of 4 samples"),
        (["expert.max_tokens=60"], RecipeError, "leaves no room for a prompt within data.max_tokens = 60"),
        (["expert.max_tokens=59"], DataError, "no prompts left"),
        (["expert.freeze_layers=3"], RecipeError, "the model has 2 blocks"),
        (["expert.reward='stage:sft'"], RecipeError, "the one stage that is a reward is stage:reward"),
        (["expert.reward='nowhere:f'"], RewardError, "nowhere"),
    ],
)
def test_bad_input_of_an_expert_stage_is_one_line(model_dir, rows, tmp_path, over, error, message):
    recipe = back_recipe(model_dir)
    with pytest.raises(error, match=message) as caught:
        upslope.train(recipe, *over, rows=rows, out=tmp_path / "run", plain=True)
    assert "\n" not in str(caught.value)


def test_samples_are_what_they_say_in_json(unbroken):
    line = json.loads(unbroken[3].splitlines()[0])
    assert line["kind"] == "sample" and set(line) > {"ids", "actions", "logp", "finish", "rewards", "total", "used"}
