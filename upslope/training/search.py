"""The next combination that a search tries, proposed by optuna's TPE from the trials before it.

A proposal is a function of the seed, the trial's number and the finished trials alone: nothing else is kept, so a
search that was stopped goes on as if it had not been. optuna is an extra and is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from upslope.config import Recipe
from upslope.errors import RecipeError
from upslope.observe.runs import HELD_OUT
from upslope.training.axes import Axis

RANDOM_TRIALS = 5  # before the first one that learns from the others
SMALLER = ("loss", "perplexity", "kl/", "rmse", "time/", "memory/", "gap", "nll", "skipped", "truncated")  # in ours
BY_STAGE = {"rl": "reward/mean", "reward": "valid/pair_accuracy", "preference": "valid/pair_accuracy"}


def load_optuna() -> Any:
    """The library, its notes silenced. Raises RecipeError where it is not installed."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise RecipeError("--search needs optuna", "pip install 'upslope[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def choose_metric(metric: str | None, recipe: Recipe, axes: Sequence[Axis]) -> tuple[str, str | None]:
    """The metric to search by, of the training or the validation side, never of the test side; and the stage, if none
    is named: the last one that a key is of, or where its model comes to. Raises RecipeError."""
    stage = None
    if metric is None:
        moved_stages = [s for s in recipe.stages if any(a.key.partition(".")[0] == s for a in axes)]
        stage = moved_stages[-1] if moved_stages else recipe.stages[-1] if recipe.rl is None else "rl"
        metric = BY_STAGE.get(stage, "valid/loss")
    if "/" not in metric or " " in metric:
        raise RecipeError(
            f"metric {metric!r} is a row of the closing table, and tuning may not look at the test side",
            "name one of training or validation, such as reward/mean or valid/loss",
        )
    moved = next((a.key for a in axes if a.key.split(".")[:2] == ["rl", "reward"]), None)
    moved = moved or next((a.key for a in axes if a.key in ("rl.overlong", "rl.algorithm")), None)
    if moved and metric == "reward/mean":
        raise RecipeError(f"{moved} changes what reward/mean means", "search by one reward of it: --metric reward/NAME")
    return metric, stage


def direction_of(metric: str, recipe: Recipe) -> str:
    """Whether less of a metric is better. More of a reward is, unless it is paid for with a weight below 0."""
    kind, _, name = metric.partition("/")
    if kind in ("reward", "task"):
        ways = {row: way for row, way in recipe.better.items() if row.startswith(f"{kind}: ")}
        less = ways.get(f"{kind}: {name.removesuffix('_low').removesuffix('_high')}", 1) < 0
        return "minimize" if less or metric == "reward/failed" else "maximize"
    return "minimize" if any(word in metric for word in SMALLER) else "maximize"


def data_of(metric: str, stage: str | None, recipe: Recipe) -> str:
    """Which data a metric is measured on, for people."""
    what = f"by {metric}{f' of {stage}' if stage else ''} ({direction_of(metric, recipe)})"
    if metric.startswith(HELD_OUT):
        return f"{what}, of the model that comes of it, on the validation side"
    return f"{what}, the mean of the last quarter of steps, on training data"


def propose(
    axes: Sequence[Axis], before: Sequence[Mapping[str, Any]], number: int, seed: int, direction: str
) -> dict[str, str]:
    """The texts to set in trial `number`. before: finished trials, each with "setting" and "objective"."""
    optuna = load_optuna()
    of = optuna.distributions
    spaces = {}
    for axis in axes:
        if axis.range is None:
            spaces[axis.key] = of.CategoricalDistribution(axis.texts)
        elif axis.range.whole:
            spaces[axis.key] = of.IntDistribution(int(axis.range.low), int(axis.range.high), log=axis.range.log)
        else:
            spaces[axis.key] = of.FloatDistribution(axis.range.low, axis.range.high, log=axis.range.log)
    sampler = optuna.samplers.TPESampler(seed=(seed * 10_007 + number) % 2**32, n_startup_trials=RANDOM_TRIALS)
    study = optuna.create_study(sampler=sampler, direction=direction)
    for trial in before:
        values = {a.key: _number(a, trial["setting"][a.key]) for a in axes}
        done = optuna.trial.create_trial(params=values, distributions=spaces, value=trial["objective"])
        study.add_trial(done)
    found = study.ask(spaces).params
    return {a.key: found[a.key] if a.range is None else a.range.text(found[a.key]) for a in axes}


def _number(axis: Axis, text: str) -> Any:
    if axis.range is None:
        return text
    return int(text) if axis.range.whole else float(text)
