"""Each alarm: from metrics made by hand, and from a run in which the very thing goes wrong."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import upslope
from tests.scores import count_vowels, fails_at_times, same_for_all
from upslope.config import RL, load_recipe
from upslope.errors import RunError
from upslope.evaluate import Estimate, Outcome
from upslope.models.runner import DecoderRunner, Layer
from upslope.observe.events import read_events
from upslope.observe.report import write_report
from upslope.training import rl as rl_module
from upslope.training import supervised
from upslope.training.alarms import ALARMS, FIRST, LAST, SKIPS_ALLOWED, WINDOW, alarms, judged_worse
from upslope.training.final import record_comparison
from upslope.training.run import Run

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
            "explained variance -0.12, mean of 5 rollouts",
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
        ({"critic/explained_variance": -0.01}, [{"critic/explained_variance": -0.02}] * (WINDOW - 1)),  # about nothing
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
    learned = [{"reward/mean": m["reward/mean"], "reward/learned": m["reward/judge"]} for m in rising]
    unpaid = RL(reward={"stage:reward": 0.0, "m.py:other": 1.0})
    assert "while learned falls" in told(learned[-1], learned[:-1], unpaid)["reward_without_metric"]


def test_an_unpaid_metric_that_is_better_when_it_falls_may_fall():
    rl = RL(reward={"chrf": 1.0, "ter": 0.0})
    noise = [0.02, -0.01, 0.0, 0.01, -0.02]

    def rollouts(way):
        return [
            {"reward/mean": 0.1 * i + noise[i % 5], "reward/ter": way * 0.05 * i + noise[i % 5]} for i in range(LAST)
        ]

    falling, rising = rollouts(-1), rollouts(1)
    assert told(falling[-1], falling[:-1], rl) == {}
    assert "while ter rises" in told(rising[-1], rising[:-1], rl)["reward_without_metric"]


def test_what_a_teacher_tells_needs_no_reward():
    rl = RL(algorithm="gkd", teacher="m")
    assert told({"reward/std": 0.0}, rl=rl) == {}


def made_up(first, second, names=("reward: r", "judge: j")):
    """One outcome of 40 prompts, by two means and the same noise about them."""
    noise = np.linspace(-1, 1, 40)
    zeros = np.zeros(40)
    scores = dict(zip(names, (first + noise, second + noise), strict=True))
    return Outcome(["a b"] * 40, scores, zeros, zeros + 2, zeros, zeros)


def certain(value):
    return Estimate(value, value - 0.01, value + 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reward": 1.0, "task: chrf": -0.5, "task: ter": 0.0},
            "reward 1.00 [0.99, 1.01] has risen while task: chrf -",
        ),
        ({"reward": 1.0, "task: ter": 0.5}, "while task: ter 0.50 [0.49, 0.51] has become worse"),
        ({"reward": 1.0, "task: ter": -0.5, "task: chrf": 0.5}, None),
        ({"reward": -1.0, "task: chrf": -0.5}, None),
        ({"reward": 0.0, "task: chrf": -0.5}, None),  # within its interval
        ({"reward": 1.0, "task: chrf": -0.005}, None),  # within its interval
        ({"reward": 1.0, "task: chrf": float("nan")}, None),
        ({"reward": float("nan"), "task: chrf": -0.5}, None),
        ({"reward": 1.0, "distinct-1": -0.5}, None),  # is no row that is to be watched
        ({"task: chrf": -0.5}, None),
    ],
)
def test_a_reward_that_rose_while_a_metric_became_worse_is_told(change, message):
    found = judged_worse({row: certain(v) for row, v in change.items()}, {"task: chrf": 1, "task: ter": -1})
    assert (found is None) if message is None else (found is not None and message in found)


def test_each_metric_judge_and_part_is_watched_the_way_that_is_better(recipe):
    recipe |= {"task": {"reference": "text", "metrics": ["chrf", "ter", "macro_f1", "vader"]}}
    recipe["rl"]["reward"] = {"chrf": 1.0, "length_words": -0.1, "ter": 0.0, "vader": 0.0}
    recipe["eval"] |= {"judges": ["ter", "vader"]}
    assert load_recipe(recipe).better == {
        "task: chrf": 1,
        "task: ter": -1,
        "task: macro_f1": 1,  # neither way of sentiment is the task's
        "judge: ter": -1,
        "judge: vader": 1,
        "reward: chrf": 1,
        "reward: length_words": -1,
        "reward: ter": -1,
        "reward: vader": 1,
    }


def closing_alarms(recipe, folder, outcomes, rewards):
    """What is told of two outcomes in a run that is paid by such a sum."""
    recipe["rl"]["reward"] = {f"m.py:{name}": weight for name, weight in rewards.items()}
    run = Run(load_recipe(recipe), folder, plain=True)
    shown = []
    run.terminal.note = lambda text, style="": shown.append((text, style))
    record_comparison(run, [], outcomes)
    run.close()
    return [text for text, style in shown if text.startswith("ALARM eval: ") and style == "bold red"]


def test_the_closing_alarm_is_recorded_shown_in_red_and_reported(recipe, tmp_path):
    outcomes = [made_up(0.0, 0.0), made_up(1.0, -0.5)]
    told = closing_alarms(recipe, tmp_path / "run", outcomes, {"r": 1.0})
    assert [text[:63] for text in told] == ["ALARM eval: on held-out prompts reward 1.00 [1.00, 1.00] has ri"]
    assert "while judge: j -0.50" in told[0]
    assert alarms_of(tmp_path / "run") == {"judged_worse": None}
    html = write_report(tmp_path / "run").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1])
    assert [a["message"][:16] for a in data["alarms"]] == ["on held-out prom"]


@pytest.mark.parametrize(
    ("rewards", "parts", "message"),
    [
        ({"a": 1.0, "b": 1.0}, (-0.5, 1.0), "reward 0.50 [0.50, 0.50] has risen while reward: a -0.50"),
        ({"a": 1.0, "b": 0.4}, (-0.5, 1.0), None),  # the sum has fallen
        ({"a": 1.0, "b": -0.5}, (1.0, 0.5), "reward 0.75 [0.75, 0.75] has risen while reward: b 0.50"),
        ({"a": 1.0, "b": -0.5}, (1.0, -0.5), None),  # it is paid for falling
        ({"a": -1.0, "b": 0.0}, (-1.0, 0.0), None),
    ],
)
def test_a_sum_that_rises_at_the_cost_of_one_of_its_parts_is_told(recipe, tmp_path, rewards, parts, message):
    outcomes = [made_up(0.0, 0.0, ("reward: a", "reward: b")), made_up(*parts, ("reward: a", "reward: b"))]
    told = closing_alarms(recipe, tmp_path / "run", outcomes, rewards)
    assert not told if message is None else message in told[0]


def test_a_sum_is_over_the_prompts_of_which_no_part_failed(recipe, tmp_path):
    outcomes = [made_up(0.0, 0.0, ("reward: a", "reward: b")), made_up(1.0, -0.5, ("reward: a", "reward: b"))]
    outcomes[0].scores["reward: b"][:20] = np.nan
    outcomes[1].scores["reward: a"][:20] = -100.0  # of the other prompts the sum has risen
    assert "reward 0.50 [0.50, 0.50]" in closing_alarms(recipe, tmp_path / "run", outcomes, {"a": 1.0, "b": 1.0})[0]


def test_every_alarm_is_tried_here():
    source = Path(__file__).read_text()
    assert all(f'"{name}"' in source for name in ALARMS)


# the same in runs


def train(recipe, rows, out, *over, reward=count_vowels):
    recipe.pop("reward", None)
    recipe.pop("sft", None)
    return upslope.train(recipe, *over, reward=reward, rows=rows, out=out, plain=True)


def alarms_of(folder):
    return {e["name"]: e.get("step") for e in read_events(folder / "events.jsonl") if e["kind"] == "alarm"}


def metric_of(folder, name):
    return [e["metrics"][name] for e in read_events(folder / "events.jsonl") if e["kind"] == "step"]


def test_a_healthy_run_gives_no_alarm_and_equal_rewards_give_one_that_does_not_repeat(recipe, rows, tmp_path):
    assert "ratio_not_one" not in alarms_of(train(dict(recipe), rows, tmp_path / "good"))
    assert alarms_of(train(dict(recipe), rows, tmp_path / "equal", reward=same_for_all))["rewards_equal"] == 1
    events = read_events(tmp_path / "equal" / "events.jsonl")
    assert len([e for e in events if e["kind"] == "alarm" and e["name"] == "rewards_equal"]) == 1
    assert metric_of(tmp_path / "equal", "loss/value")[0] < 1e-9  # a new critic expects the mean score


def test_no_completion_that_ends_is_told_after_some_rollouts(recipe, rows, tmp_path):
    found = alarms_of(train(recipe, rows, tmp_path / "run", "rl.max_tokens=1", f"rl.steps={WINDOW + 1}", "eval.show=0"))
    assert found["nothing_ends"] >= WINDOW


def test_some_failing_rewards_mark_the_run(recipe, rows, tmp_path):
    found = alarms_of(train(recipe, rows, tmp_path / "run", "limits.max_failures=0.99", reward=fails_at_times))
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


REWARDS = """
calls = []

def vowels(prompts, completions, rows):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]

def rest(prompts, completions, rows):
    return [sum(c not in "aeiou" for c in text) / max(1, len(text)) for text in completions]

def fickle(prompts, completions, rows):
    calls.append(1)
    return [(-1.0) ** len(calls) * len(prompt) for prompt in prompts]
"""


def paid_by_files(recipe, folder, rewards):
    """rl alone, paid by functions of a file: name -> weight."""
    (folder / "rewards.py").write_text(REWARDS)
    recipe["rl"]["reward"] = {f"{folder}/rewards.py:{name}": weight for name, weight in rewards.items()}
    recipe["rl"]["kl"] = 0
    recipe["checkpoint_minutes"] = 60
    return recipe


def test_a_policy_that_says_one_thing_only_is_told(recipe, rows, tmp_path):
    paid_by_files(recipe, tmp_path, {"vowels": 1.0})
    folder = train(recipe, rows, tmp_path / "run", "rl.optim.lr=0.05", "rl.steps=20", reward=None)
    entropy = metric_of(folder, "policy/entropy")
    first = next(i for i, value in enumerate(entropy, 1) if i > FIRST and value < 0.1 * np.mean(entropy[:FIRST]))
    assert alarms_of(folder)["entropy_collapsed"] == first


def test_a_reward_that_is_climbed_at_the_cost_of_a_metric_is_told_twice(recipe, rows, tmp_path):
    """While it happens, by the trends over rollouts, and at the end, by the table."""
    paid_by_files(recipe, tmp_path, {"vowels": 1.0, "rest": 0.0})
    folder = train(recipe, rows, tmp_path / "run", "rl.optim.lr=0.01", "rl.steps=24", "eval.prompts=24", reward=None)
    found = alarms_of(folder)
    assert found["reward_without_metric"] >= LAST and "judged_worse" in found
    assert (
        "reward: rest -"
        in next(e for e in read_events(folder / "events.jsonl") if e.get("name") == "judged_worse")["message"]
    )


def test_a_critic_that_is_worse_than_none_is_told(recipe, rows, tmp_path):
    """What it has learned of one rollout is the opposite of the next one's truth: the reward changes its sign."""
    paid_by_files(recipe, tmp_path, {"fickle": 1.0})
    recipe["rl"] |= {"critic": "detached", "value_weight": 1.0, "value_clip": 100.0, "prompts": 18, "epochs": 4}
    folder = train(recipe, rows, tmp_path / "run", "rl.optim.lr=0.01", "rl.steps=10", reward=None)
    told_at, explained = alarms_of(folder)["critic_misleads"], metric_of(folder, "critic/explained_variance")
    assert all(value < 0 for value in explained[told_at - WINDOW : told_at])


def test_c50_weights_that_do_not_reach_the_engine_stop_the_run(recipe, rows, tmp_path, monkeypatch):
    inner, loads = Layer.load, []

    def lost(self, block):
        loads.append(1)
        if len(loads) <= 2:  # two layers, filled once; later on they stay as they are
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


@pytest.mark.parametrize("stage", ["reward", "rl"])
def test_the_other_loops_stop_with_their_batch_saved_too(recipe, rows, tmp_path, monkeypatch, stage):
    inner = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **o: inner(*a, **o) * float("nan"))
    del recipe["sft"]
    del recipe["rl" if stage == "reward" else "reward"]
    own = count_vowels if stage == "rl" else None
    with pytest.raises(RunError, match=f"lower {stage}.optim.lr, and look at the last batch"):
        upslope.train(recipe, f"{stage}.steps=9", reward=own, rows=rows, out=tmp_path / "run", plain=True)
    saved = json.loads((tmp_path / "run" / stage / "bad-batch.json").read_text())
    assert saved["step"] == SKIPS_ALLOWED and saved["metrics"]["optim/skipped"] == 1.0
    assert all(item["chosen" if stage == "reward" else "actions"] for item in saved["batch"])


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
