"""Alarms: what the metrics of a rollout say when a run no longer does what it should.

Each alarm is a pure function of a rollout's metrics, those of earlier rollouts and the [rl] table, and answers with a
message or nothing. One that begins is recorded, shown in red and put into the report; while it lasts it is silent.
Three things stop a run instead, for it can no longer be right: optimizer steps in a row that are not finite (below),
weights that did not reach the engine (engine.py), and more failed rewards than limits.max_failures (scoring.py).
Held-out prompts have an alarm of their own (judged_worse), in the table at the end and where [task] measures on the
way; so has a best model whose checkpoint is damaged (best.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from upslope.checkpoint import atomic_write_text
from upslope.config import RL, source_name
from upslope.config.metrics import falls
from upslope.errors import RunError
from upslope.evaluate import Estimate
from upslope.training.run import Run
from upslope.training.state import RunState

Metrics = Mapping[str, float]

SKIPS_ALLOWED = 4  # optimizer steps in a row without a finite loss and gradient; one more stops the run
RATIO_GAP = 0.05  # mean |ratio - 1| on the first minibatch, where it is 1 but for rounding
SAMPLER_GAP = 0.1  # nats a token: sampler and trainer no longer hold the same policy
KL_TIMES_TARGET = 3.0  # KL to the start over rl.kl_target
KL_PER_TOKEN = 1.0  # nats a token, without a target: each token e times as likely as at the start, on average
ENTROPY_LEFT = 0.1  # share of the first rollouts' entropy
FAILED = 0.05  # share of rewards
FIRST = 3  # rollouts that "the first" are
LAST = 20  # rollouts that trends are read from
WINDOW = 5  # rollouts that "for some time" is
MISLED = -0.02  # explained variance, their mean: a critic that says nothing stays about 0
REWARD = "reward"  # what is paid: the weighted sum of the rewards
SURE = 3.0  # slope over its standard error, for a trend


def not_finite(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    share = now.get("optim/skipped", 0.0)
    if share:
        return f"{100 * share:.0f} % of the optimizer steps had a loss or gradient that is not finite, and were skipped"
    return None


def ratio_not_one(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    gap = now.get("policy/first_ratio_gap", 0.0)
    return _beyond(gap, RATIO_GAP, f"first minibatch: the ratio differs from 1 by {gap:.3f} on average")


def sampler_gap(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    gap = now.get("policy/sampler_gap_mean", 0.0)
    return _beyond(gap, SAMPLER_GAP, f"sampler and trainer differ by {gap:.3f} nats a token on average")


def far_from_start(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    if rl.kl_target is not None:
        found = now.get("kl/reference_per_completion", 0.0)
        bound = KL_TIMES_TARGET * rl.kl_target
        return _beyond(found, bound, f"KL to the start is {found:.2f} nats a completion, above {bound:g}")
    found = now.get("kl/reference_per_token", 0.0)
    return _beyond(found, KL_PER_TOKEN, f"KL to the start is {found:.2f} nats a token, above {KL_PER_TOKEN:g}")


def entropy_collapsed(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    first = [m["policy/entropy"] for m in before[:FIRST] if "policy/entropy" in m]
    if len(first) < FIRST or "policy/entropy" not in now:
        return None
    start, found = float(np.mean(first)), now["policy/entropy"]
    if found < ENTROPY_LEFT * start:
        return f"entropy is {found:.3f} nats a token, {start:.3f} at first: the policy hardly varies any more"
    return None


def nothing_ends(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    if now.get("length/truncated", 0.0) == 1.0 and _for_some_time(before, "length/truncated", lambda x: x == 1.0):
        return f"no completion ends by itself: all are cut at rl.max_tokens = {rl.max_tokens}"
    return None


def rewards_equal(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    if rl.rewards and rl.loss != "none" and now.get("reward/std", 1.0) == 0.0:  # else something other teaches
        return f"every completion has the same reward, {now['reward/mean']:g}: nothing to learn from"
    return None


def rewards_failing(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    share = now.get("reward/failed", 0.0)
    return _beyond(share, FAILED, f"{100 * share:.0f} % of the rewards failed; the reasons are in episodes.jsonl")


def reward_without_metric(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    """The reward rises and a metric becomes worse: one named in rl.reward with weight 0, which nothing is paid for."""
    recent = [*before[-LAST + 1 :], now]
    if len(recent) < LAST or _trend(recent, "reward/mean") < SURE:
        return None
    for source, weight in rl.rewards.items():
        name = f"reward/{source_name(source)}"
        trend = -_trend(recent, name) if falls(source) else _trend(recent, name)
        if weight == 0 and trend < -SURE:
            how = "rises" if falls(source) else "falls"
            return f"the reward rises while {name.removeprefix('reward/')} {how}: it may be learned to be cheated"
    return None


def critic_misleads(now: Metrics, before: Sequence[Metrics], rl: RL) -> str | None:
    name = "critic/explained_variance"
    recent = [m[name] for m in [*before[-WINDOW + 1 :], now] if name in m]
    if len(recent) == WINDOW and max(recent) < 0 and (mean := float(np.mean(recent))) < MISLED:
        found = f"explained variance {mean:.2f}, mean of {WINDOW} rollouts"
        return f"the critic explains less than a constant would: {found}; its rate is rl.critic_lr"
    return None


ALARMS: Mapping[str, Callable[[Metrics, Sequence[Metrics], RL], str | None]] = {
    alarm.__name__: alarm
    for alarm in (
        not_finite,
        ratio_not_one,
        sampler_gap,
        far_from_start,
        entropy_collapsed,
        nothing_ends,
        rewards_equal,
        rewards_failing,
        reward_without_metric,
        critic_misleads,
    )
}


def alarms(now: Metrics, before: Sequence[Metrics], rl: RL) -> dict[str, str]:
    """Name -> message of every alarm that a rollout gives. before: the FIRST rollouts of the run and the LAST ones."""
    found = {name: alarm(now, before, rl) for name, alarm in ALARMS.items()}
    return {name: message for name, message in found.items() if message}


def judged_worse(change: Mapping[str, Estimate], ways: Mapping[str, int]) -> str | None:
    """Held-out prompts: the reward rises while a metric of the task, a judge or one of its own parts becomes worse.

    Both beyond chance. change: of the rows of a table, and of REWARD; ways: which way is better, of some of them.
    """
    known = {row: change[row] for row in ways if row in change}
    worse = [row for row, e in known.items() if (e.high < 0 if ways[row] > 0 else e.low > 0)]
    if REWARD not in change or not change[REWARD].low > 0 or not worse:
        return None
    down = ", ".join(f"{row} {change[row].text(2)}" for row in worse)
    how = "become worse" if any(ways[row] < 0 for row in worse) else "fallen"
    up = f"{REWARD} {change[REWARD].text(2)}"
    return f"on held-out prompts {up} has risen while {down} has {how}: the reward may have been cheated"


def watch(run: Run, rl: RL, state: RunState, metrics: Metrics) -> None:
    """Record the alarms that begin with this rollout. What was seen is in the state: a resumed run agrees."""
    seen = state.extra.setdefault("alarms", {"before": [], "active": []})
    found = alarms(metrics, seen["before"], rl)
    for name, message in found.items():
        if name not in seen["active"]:
            run.record("alarm", stage=state.stage, step=state.rollout, name=name, message=message)
    kept = [*seen["before"], {name: value for name, value in metrics.items() if _is_watched(name)}]
    state.extra["alarms"] = {"before": kept[:FIRST] + kept[FIRST:][-LAST:], "active": sorted(found)}


def count_skipped(run: Run, state: RunState, metrics: Metrics, batch: Sequence[Any]) -> None:
    """Count optimizer steps in a row whose loss or gradient was not finite; one too many stops the run.

    The batch of the last one (examples, pairs or episodes) is saved in the stage's folder. Raises RunError.
    """
    if not metrics.get("optim/skipped"):
        state.extra.pop("skipped", None)
        return
    state.extra["skipped"] = state.extra.get("skipped", 0) + 1
    if state.extra["skipped"] > SKIPS_ALLOWED:
        path = run.stage_folder(state.stage) / "bad-batch.json"
        atomic_write_text(
            path, json.dumps({"step": state.step, "metrics": dict(metrics), "batch": [asdict(item) for item in batch]})
        )
        raise RunError(
            f"{state.extra['skipped']} optimizer steps in a row had a loss or gradient that is not finite",
            f"lower {state.stage}.optim.lr, and look at the last batch, {path}",
        )


def _beyond(value: float, bound: float, message: str) -> str | None:
    """The message where the value is above its bound, or no number at all."""
    return None if value <= bound else message


def _for_some_time(before: Sequence[Metrics], name: str, bad: Callable[[float], bool]) -> bool:
    recent = [m[name] for m in before[-WINDOW + 1 :] if name in m]
    return len(recent) == WINDOW - 1 and all(bad(value) for value in recent)


def _trend(rollouts: Sequence[Metrics], name: str) -> float:
    """Slope of a metric over rollouts, over the slope's standard error; 0 where it is not known or does not vary."""
    y = np.array([m.get(name, np.nan) for m in rollouts])
    if not np.isfinite(y).all() or np.ptp(y) == 0:
        return 0.0
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    error = float(np.sqrt(rest @ rest / (len(y) - 2) / (x @ x)))
    return slope / max(error, 1e-12)


def _is_watched(name: str) -> bool:
    return name in ("policy/entropy", "length/truncated", "critic/explained_variance") or name.startswith("reward/")
