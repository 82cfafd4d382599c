"""Each alarm: from metrics made by hand, and from a run in which the very thing goes wrong."""

import json
from pathlib import Path

import pytest
import torch

import upslope
from tests.training.test_pipeline import count_vowels
from upslope.config import RL
from upslope.errors import RunError
from upslope.models.runner import DecoderRunner, Layer
from upslope.observe.events import read_events
from upslope.training import rl as rl_module
from upslope.training import supervised
from upslope.training.alarms import ALARMS, FIRST, LAST, SKIPS_ALLOWED, WINDOW, alarms

PLAIN = RL(reward="a:b")
GOOD = {
    "optim/skipped": 0.0,
    "policy/first_ratio_gap": 1e-6,
    "policy/sampler_gap_mean": 1e-6,
    "policy/entropy": 2.0,
    "kl/reference_per_completion": 2.0,
    "kl/reference_per_token": 0.2,
    "length/truncated": 0.5,
    "reward/mean": 0.1,
    "reward/std": 1.0,
    "reward/failed": 0.0,
    "critic/explained_variance": 0.3,
}


def told(changes, before=(), rl=PLAIN):
    return alarms(GOOD | changes, [GOOD | b for b in before], rl)


def test_a_healthy_rollout_gives_no_alarm():
    assert told({}) == {} and told({}, [{}] * 30) == {}
    assert alarms({}, [], PLAIN) == {}  # an algorithm may have none of these metrics


@pytest.mark.parametrize(
    ("name", "changes", "before", "message"),
    [
        ("not_finite", {"optim/skipped": 0.25}, [], "25 % of the optimizer steps"),
        ("ratio_not_one", {"policy/first_ratio_gap": 0.06}, [], "the ratio differs from 1 by 0.060 on average"),
        ("ratio_not_one", {"policy/first_ratio_gap": float("nan")}, [], "the ratio differs from 1 by nan"),
        ("sampler_gap", {"policy/sampler_gap_mean": 0.11}, [], "differ by 0.110 nats a token"),
        ("far_from_start", {"kl/reference_per_token": 1.5}, [], "KL to the start is 1.50 nats a token, above 1"),
        ("entropy_collapsed", {"policy/entropy": 0.19}, [{}] * FIRST, "entropy is 0.190 nats a token, 2.000 at first"),
        ("nothing_ends", {"length/truncated": 1.0}, [{"length/truncated": 1.0}] * (WINDOW - 1), "rl.max_tokens = 64"),
        ("rewards_equal", {"reward/std": 0.0}, [], "every completion has the same reward, 0.1"),
        ("rewards_failing", {"reward/failed": 0.06}, [], "6 % of the rewards failed"),
        (
            "critic_misleads",
            {"critic/explained_variance": -0.2},
            [{"critic/explained_variance": -0.1}] * (WINDOW - 1),
            "explained variance -0.20",
        ),
    ],
)
def test_what_each_alarm_says_and_when(name, changes, before, message):
    found = told(changes, before)
    assert list(found) == [name] and message in found[name]


@pytest.mark.parametrize(
    ("changes", "before"),
    [
        ({"policy/entropy": 0.21}, [{}] * FIRST),
        ({"policy/entropy": 0.01}, [{}] * (FIRST - 1)),  # what it was at first is not known yet
        ({"length/truncated": 1.0}, [{"length/truncated": 1.0}] * 3 + [{"length/truncated": 0.9}]),
        ({"length/truncated": 1.0}, []),
        ({"critic/explained_variance": -0.2}, [{"critic/explained_variance": -0.1}] * 3 + [{}]),
    ],
)
def test_what_lasts_too_short_or_is_too_little_gives_none(changes, before):
    assert told(changes, before) == {}


def test_the_kl_bound_follows_the_target():
    rl = RL(reward="a:b", kl_target=2.0)
    assert told({"kl/reference_per_completion": 6.1, "kl/reference_per_token": 9.0}, rl=rl) == {
        "far_from_start": "KL to the start is 6.10 nats a completion, above 6"
    }
    assert told({"kl/reference_per_completion": 5.9, "kl/reference_per_token": 9.0}, rl=rl) == {}


def test_a_reward_that_rises_while_an_unpaid_metric_falls():
    rl = RL(reward={"stage:reward": 1.0, "m.py:judge": 0.0})
    noise = [0.02, -0.01, 0.0, 0.01, -0.02]
    rising = [{"reward/mean": 0.1 * i + noise[i % 5], "reward/judge": -0.05 * i + noise[i % 5]} for i in range(LAST)]
    flat = [{"reward/mean": 0.1 * i, "reward/judge": noise[i % 5]} for i in range(LAST)]
    assert list(told(rising[-1], rising[:-1], rl)) == ["reward_without_metric"]
    assert "while judge falls" in told(rising[-1], rising[:-1], rl)["reward_without_metric"]
    assert told(flat[-1], flat[:-1], rl) == {}
    assert told(rising[-2], rising[:-2], rl) == {}  # too few to be sure
    paid = RL(reward={"stage:reward": 1.0, "m.py:judge": 0.5})
    assert told(rising[-1], rising[:-1], paid) == {}


def test_every_alarm_is_tried_here():
    source = Path(__file__).read_text()
    assert all(f'"{name}"' in source for name in ALARMS)


# the same in runs


def train(recipe, rows, out, *over, reward=count_vowels):
    recipe.pop("reward", None)
    recipe.pop("sft", None)
    return upslope.train(recipe, *over, reward=reward, rows=rows, out=out, plain=True)


def alarms_of(folder):
    return {e["name"]: e["step"] for e in read_events(folder / "events.jsonl") if e["kind"] == "alarm"}


def same_for_all(prompts, completions, rows):
    return [1.0] * len(completions)


def fails_at_times(prompts, completions, rows):
    return [None if "e" in c else 1.0 * len(c) for c in completions]


def test_a_healthy_run_gives_no_alarm_and_equal_rewards_give_one_that_does_not_repeat(recipe, rows, tmp_path):
    assert "ratio_not_one" not in alarms_of(train(dict(recipe), rows, tmp_path / "good"))
    assert alarms_of(train(dict(recipe), rows, tmp_path / "equal", reward=same_for_all))["rewards_equal"] == 1
    events = read_events(tmp_path / "equal" / "events.jsonl")
    assert len([e for e in events if e["kind"] == "alarm" and e["name"] == "rewards_equal"]) == 1


def test_no_completion_that_ends_is_told_after_some_rollouts(recipe, rows, tmp_path):
    found = alarms_of(train(recipe, rows, tmp_path / "run", "rl.max_tokens=1", f"rl.steps={WINDOW + 1}", "eval.show=0"))
    assert found["nothing_ends"] >= WINDOW


def test_some_failing_rewards_mark_the_run(recipe, rows, tmp_path):
    found = alarms_of(train(recipe, rows, tmp_path / "run", "rl.max_failures=0.99", reward=fails_at_times))
    assert "rewards_failing" in found


def test_c52_a_sampler_that_is_not_the_trainers_policy_is_told(recipe, rows, tmp_path, monkeypatch):
    """The engine's arithmetic is wrong: its weights arrived, but a norm is computed otherwise."""
    inner = DecoderRunner.step

    def off(self, cache, ids_S):
        return inner(self, cache, ids_S) * 1.5

    monkeypatch.setattr(DecoderRunner, "step", off)
    assert alarms_of(train(recipe, rows, tmp_path / "run"))["sampler_gap"] == 1


def test_c16_a_first_ratio_that_is_not_one_is_told(recipe, rows, tmp_path, monkeypatch):
    inner = rl_module.prepare

    def stale(*args, **options):
        batch, metrics = inner(*args, **options)
        batch.old_logp_A -= 0.3
        return batch, metrics

    monkeypatch.setattr(rl_module, "prepare", stale)
    assert alarms_of(train(recipe, rows, tmp_path / "run"))["ratio_not_one"] == 1


def test_a_policy_driven_far_from_its_start_is_told(recipe, rows, tmp_path):
    found = alarms_of(train(recipe, rows, tmp_path / "run", "rl.optim.lr=0.3", "rl.kl=0.0001", "rl.steps=6"))
    assert "far_from_start" in found


def test_c50_weights_that_do_not_reach_the_engine_stop_the_run(recipe, rows, tmp_path, monkeypatch):
    inner, loads = Layer.load, []

    def lost(self, block):
        loads.append(1)
        if len(loads) <= 4:  # two layers, made and filled once; later ones stay as they are
            inner(self, block)

    monkeypatch.setattr(Layer, "load", lost)
    with pytest.raises(RunError, match="weights of version 1 did not reach the engine"):
        train(recipe, rows, tmp_path / "run")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_steps_without_a_finite_loss_are_skipped_and_some_in_a_row_stop_the_run(
    recipe, rows, tmp_path, monkeypatch, bad
):
    del recipe["reward"], recipe["rl"]
    inner, made = supervised.example_logprobs, []

    def broken(model, examples):
        logp_A = inner(model, examples)
        if torch.is_grad_enabled():
            made.append(1)
            return logp_A * bad
        return logp_A

    monkeypatch.setattr(supervised, "example_logprobs", broken)
    with pytest.raises(
        RunError, match=f"{SKIPS_ALLOWED + 1} optimizer steps in a row had a loss or gradient"
    ) as caught:
        upslope.train(recipe, "sft.steps=20", rows=rows, out=tmp_path / "run", plain=True)
    saved = json.loads((tmp_path / "run" / "sft" / "bad-batch.json").read_text())
    assert str(tmp_path / "run" / "sft" / "bad-batch.json") in str(caught.value)
    assert len(saved["batch"]) == 4 and saved["batch"][0]["ids"] and saved["step"] == SKIPS_ALLOWED
    steps = [e["metrics"] for e in read_events(tmp_path / "run" / "events.jsonl") if e["kind"] == "step"]
    assert [s["optim/skipped"] for s in steps] == [1.0] * SKIPS_ALLOWED


def test_a_single_bad_step_is_skipped_counted_and_marked(recipe, rows, tmp_path, monkeypatch):
    inner, calls = torch.nn.utils.clip_grad_norm_, []

    def once(*args, **options):
        norm = inner(*args, **options)
        calls.append(1)
        return norm * float("nan") if len(calls) == 2 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", once)
    folder = train(recipe, rows, tmp_path / "run")
    assert alarms_of(folder)["not_finite"] == 1
    steps = [e["metrics"] for e in read_events(folder / "events.jsonl") if e["kind"] == "step"]
    assert [round(s["optim/skipped"] * 6) for s in steps] == [1, 0, 0]
    assert all(torch.isfinite(w).all() for w in upslope.load(folder, dtype="fp32").model.state_dict().values())
