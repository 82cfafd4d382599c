"""Run folders read for comparison: what was set, what was measured, and how far each run came.

    runs = [read_run(folder) for folder in folders]
    columns = differing([run.settings for run in runs])
    measures(runs[0])["advantage/std"]

A measure is one number of a run. Curves are averaged over all rollouts or over the last quarter of them; held-out
values come from the closing evaluation. Everything is read from the files: a run may still be going on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from upslope.config import POLICY_STAGES, PRESETS, RL, STAGES
from upslope.errors import RunError
from upslope.observe.events import read_events
from upslope.observe.report import collect

Curve = list[tuple[int, float]]

T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # 1 to 10 degrees of freedom
Z_975 = 1.959964
NEVER_COLUMNS = ("name", "seed", "checkpoint_minutes")  # what makes no difference, and what intervals are taken over
ALL_ROLLOUTS = ("advantage/std", "advantage/bias", "advantage/rmse")
LAST_QUARTER = ("reward/mean", "kl/reference_per_completion", "critic/explained_variance")
HELD_OUT = ("valid/", "task/")  # metrics of the validation side
KINDS = ("task: ", "reward: ", "judge: ")  # rows of the closing table that a comparison shows


@dataclass(frozen=True)
class RunFacts:
    """One run folder. settings: the recipe and the machine, flat, by dotted key; state: "done", or how far it came."""

    folder: Path
    settings: dict[str, Any]
    curves: dict[str, dict[str, Curve]]  # stage -> metric -> (step, value)
    final: dict[str, dict[str, float | None]]  # row of the closing table -> {"before", "after"}
    state: str
    sweep: Path | None = None  # the sweep that it belongs to
    failure: str | None = None
    closing: dict[str, dict[str, float]] = field(default_factory=dict)  # stage -> what it said at its end

    @property
    def done(self) -> bool:
        return self.state == "done"


@dataclass(frozen=True)
class Estimate:
    """The mean of `count` runs; half: half the width of its 95 % interval, None for a single run."""

    mean: float
    half: float | None
    count: int
    values: tuple[float, ...] = field(repr=False, default=())


def read_run(folder: Path, *, sweep: Path | None = None, failure: str | None = None) -> RunFacts:
    """Read a run folder, finished or not. Raises RunError where it holds no run."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder: it has no recipe.json", "name the folder of a run or of a sweep")
    recipe = read_json(path)
    steps = steps_of(recipe)
    machine = read_json(folder / "machine.json") if (folder / "machine.json").is_file() else {}
    settings = flat({**recipe, "machine": {k: machine.get(k) for k in ("device", "dtype", "threads", "processor")}})
    settings["stages"] = "+".join(step for step in steps if step in STAGES)
    log = folder / "events.jsonl"
    read = collect(read_events(log))["stages"] if log.is_file() else {}
    curves: dict[str, dict[str, Curve]] = {
        stage: {
            name: [(step, float(value)) for step, value in points if value is not None]
            for name, points in facts.get("curves", {}).items()
        }
        for stage, facts in read.items()
    }
    finished = [stage for stage in steps if (folder / stage / "done.json").is_file()]
    final = read_json(folder / "eval" / "done.json")["metrics"] if "eval" in finished else {}
    state = "done" if finished == steps else _progress(recipe, steps, finished, curves)
    failure = failure if state != "done" else None
    closing = {stage: read_json(folder / stage / "done.json")["metrics"] for stage in finished if stage in STAGES}
    return RunFacts(folder, settings, curves, final, state, sweep, failure, closing)


def steps_of(recipe: Mapping[str, Any]) -> list[str]:
    """The stages of a run in order, as its recipe.json has them, and the closing evaluation where there is one."""
    stages = [stage for stage in STAGES if recipe.get(stage)]
    measured = bool((recipe.get("task") or {}).get("metrics")) and any(stage in POLICY_STAGES for stage in stages)
    return [*stages, "eval"] if "rl" in stages or measured else stages


def find_runs(folder: Path) -> list[RunFacts]:
    """The run in a folder, or all runs of a sweep's folder, in the sweep's order. Raises RunError."""
    if (folder / "recipe.json").is_file():
        return [read_run(folder)]
    index = read_json(folder / "sweep.json")["runs"] if (folder / "sweep.json").is_file() else {}
    held = [path.parent for path in folder.glob("[!.]*/recipe.json")] if folder.is_dir() else []
    places = {name: n for n, name in enumerate(index)}
    held.sort(key=lambda path: (places.get(path.name, len(places)), path.name))
    if not held and not index:
        raise RunError(f"{folder} holds no run and no sweep", "name the folder of a run or of a sweep")
    failures = {name: record.get("reason") for name, record in index.items() if record["status"] == "failed"}
    return [read_run(path, sweep=folder, failure=failures.get(path.name)) for path in held]


def measures(run: RunFacts) -> dict[str, float]:
    """Name -> number, in the order of the table; what the run has not measured is left out."""
    found: dict[str, float] = {}
    for kind in KINDS:
        for name, row in run.final.items():
            after = row["after"]
            if name.startswith(kind) and after is not None and math.isfinite(after):
                found[name] = after
    rl = run.curves.get("rl", {})
    if "rl" not in run.settings["stages"].split("+"):
        for stage in run.settings["stages"].split("+"):
            for name in run.curves.get(stage, {}):
                value = held_out(run, stage, name) if name.startswith("valid/") else None
                if value is not None:
                    found[f"{stage}: {name}"] = value
    for name in ("reward/mean", *ALL_ROLLOUTS, *LAST_QUARTER[1:]):
        curve = rl.get(name, [])
        if curve:
            found[name] = fmean(v for _, v in (curve if name in ALL_ROLLOUTS else last_quarter(curve)))
    seconds, tokens = dict(rl.get("time/step_s", [])), dict(rl.get("tokens/sampled", []))
    if seconds:
        found["time/step_s"] = median(seconds.values())
        paces = [tokens[step] / s for step, s in seconds.items() if step in tokens and s > 0]
        if paces:
            found["tokens/s"] = median(paces)
    return found


def objective(run: RunFacts, metric: str, stage: str | None = None) -> float | None:
    """A metric of training or of the validation side, of a stage or of the last that has it; never of the test side.

    A held-out metric counts as the model has it that the stage hands on, any other with the mean of its last quarter of
    steps.
    """
    for name in [stage] if stage else reversed(STAGES):
        curve = run.curves.get(name, {}).get(metric, [])
        if curve:
            return (
                held_out(run, name, metric) if metric.startswith(HELD_OUT) else fmean(v for _, v in last_quarter(curve))
            )
    return None


def held_out(run: RunFacts, stage: str, metric: str) -> float | None:
    """Of the model that a stage hands on, which need not be its last one; the last value while it is not finished."""
    curve, closing = run.curves.get(stage, {}).get(metric, []), run.closing.get(stage, {})
    return closing[metric] if metric in closing else curve[-1][1] if curve else None


def last_quarter(curve: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """The last quarter of a curve's points, rounded up: one of four, two of five."""
    return curve[len(curve) - math.ceil(len(curve) / 4) :]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean with its 95 % Student-t interval over runs: mean +- t(n-1) s / sqrt(n)."""
    count = len(values)
    half = t_quantile(count - 1) * stdev(values) / math.sqrt(count) if count > 1 else None
    return Estimate(fmean(values), half, count, tuple(values))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond 10 degrees of freedom by its expansion around the normal one.

    Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", 26.7.5; right to 1e-4 there.
    """
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z, n = Z_975, float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ between runs, among those that have the key; seed and name are no such key.

    A stage's optim.x that only follows the recipe's own optim.x is left out, and so are keys of [rl] that are in every
    run what its algorithm's row says.
    """
    keys = list(dict.fromkeys(key for one in settings for key in one if key not in NEVER_COLUMNS))
    found = [key for key in keys if len({json.dumps(one[key]) for one in settings if key in one}) > 1]

    def follows(key: str) -> bool:
        _, optim, leaf = key.partition(".optim.")
        parent = f"optim.{leaf}"
        return bool(optim) and parent in found and all(one.get(key, one[parent]) == one[parent] for one in settings)

    def of_algorithm(key: str) -> bool:
        runs = [one for one in settings if "rl.algorithm" in one]
        return key.startswith("rl.") and all(one.get(key) == _row(one["rl.algorithm"]).get(key) for one in runs)

    by_name = "rl.algorithm" in found
    return [key for key in found if not follows(key) and not (by_name and key != "rl.algorithm" and of_algorithm(key))]


@cache
def _row(algorithm: str) -> dict[str, Any]:
    """[rl] as an algorithm's name alone makes it, by dotted key; nothing for a name that is none."""
    if algorithm not in PRESETS:
        return {}
    given = {"teacher": "t"} if algorithm == "gkd" else {"reward": "a:b"}
    return flat({"rl": RL.model_validate({"algorithm": algorithm, **given}).model_dump(mode="json")})


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys -> the shortest ends of them that tell them apart: rl.lam -> lam."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [k for k in keys if k != key]
        names[key] = next((e for e in ends if not any(o == e or o.endswith(f".{e}") for o in others)), key)
    return names


def flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted key; lists are values, and an empty place (None) of a stage has no keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{where}{key}.")
        elif value is not None or where or key not in STAGES:
            found[f"{where}{key}"] = value
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises RunError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}", "name a folder that you may read") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}", "remove that folder, or write the file anew") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: it holds no table", "remove that folder, or write the file anew")
    return found


def _progress(
    recipe: Mapping[str, Any], steps: Sequence[str], finished: Sequence[str], curves: Mapping[str, dict[str, Curve]]
) -> str:
    stage = next((s for s in steps if s not in finished), steps[-1])
    if stage == "eval":
        return "trained, not evaluated"
    reached = max((curve[-1][0] for curve in curves.get(stage, {}).values() if curve), default=0)
    return f"{stage} {reached} of {recipe[stage].get('steps', '?')}"
