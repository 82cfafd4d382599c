"""Many runs of one recipe: a grid of values, or a search, each with several seeds; each run a process of its own.

    run_sweep("sentiment-ppo", [parse_axis("rl.lam=0.9,0.95,1.0")], [], seeds=3)

OUT/lam=0.9,seed=1/      an ordinary run; its folder's name says what was set
OUT/sweep.json           what is swept, how each run ended, and the trials of a search
OUT/compare.*            the comparison (observe/compare.py), written at the end

All recipes are read before anything runs. The same call carries on: finished runs are skipped, half-done ones resumed,
failed ones tried again. Stages before the one that a key is of are run once a seed (share.py). A search goes by
metrics of the training or the validation side only.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from upslope.config import Recipe, describe, may_change, with_newer_keys
from upslope.errors import Interrupted, RecipeError, RunError
from upslope.observe.compare import compare, show
from upslope.observe.runs import flat, objective, read_json, read_run, steps_of
from upslope.observe.terminal import Terminal
from upslope.training.axes import Axis, Planned, combinations, plan
from upslope.training.process import Process, passing_signals_on
from upslope.training.search import choose_metric, data_of, direction_of, load_optuna, propose
from upslope.training.share import begin_from


@dataclass
class Sweep:
    """A sweep's folder while it is worked on. record: what sweep.json holds."""

    folder: Path
    record: dict[str, Any]
    process: Process
    terminal: Terminal
    reward: Any = None
    rows: Any = None

    def save(self) -> None:
        beside = self.folder / "sweep.json.new"
        try:
            beside.write_text(json.dumps(self.record, indent=1, ensure_ascii=False), encoding="utf-8")
            os.replace(beside, self.folder / "sweep.json")
        except OSError as error:
            raise RunError(
                f"cannot write in {self.folder}: {error.strerror}", "choose another folder with -o"
            ) from None

    def note(self, name: str, status: str, reason: str = "") -> None:
        """Remember how a run ended."""
        self.record["runs"][name] = {"status": status} | ({"reason": reason} if reason else {})
        self.save()

    def run(self, planned: Planned, number: str) -> bool:
        """Bring one run to its end; False where it failed. Raises Interrupted when asked to stop."""
        folder = self.folder / planned.name
        table = planned.recipe.model_dump(mode="json")
        if finished(folder, table):
            self.note(planned.name, "done")
            return True
        self.terminal.note(f"\nrun {number}: {planned.name}", style="bold")
        if not self.process.stop_requests:
            others = [self.folder / name for name in self.record["runs"] if name != planned.name]
            if shared := begin_from(others, folder, table):
                self.terminal.note(shared)
            said = planned.recipe.model_dump(mode="json", exclude_unset=True)  # what is open may go by the machine
            reason = self.process.run(said, folder, self.reward, self.rows)
        if self.process.stop_requests:
            self.note(planned.name, "stopped")
            done = sum(run["status"] == "done" for run in self.record["runs"].values())
            raise Interrupted(f"stopped in {planned.name}, {done} runs finished", "the same command carries on")
        self.note(planned.name, "failed" if reason else "done", reason)
        if reason:
            self.terminal.note(f"{planned.name} failed: {reason}", style="bold red")
        return not reason


def run_sweep(
    source: str | Path | Mapping[str, Any],
    axes: Sequence[Axis],
    overrides: Sequence[str],
    *,
    seeds: int,
    search: int | None = None,
    metric: str | None = None,
    out: Path | None = None,
    reward: Any = None,
    rows: Any = None,
    plain: bool | None = None,
) -> Path:
    """Run every combination (or `search` trials) with every seed, compare them; returns the sweep's folder.

    Raises RecipeError before anything runs, Interrupted after saving, and at the end RunError where a run failed.
    """
    _check(axes, seeds, search, metric)
    corners = combinations(axes) if search is None else _corners(axes)
    planned = plan(source, overrides, corners, seeds if search is None else 1)
    first = planned[0].recipe
    folder = out or Path("runs") / f"{first.name}-sweep"
    with _locked(folder) as lock:
        process = Process(plain=plain, kept_open=(lock,))
        sweep = Sweep(folder, _opened(folder), process, Terminal(plain), reward, rows)
        with passing_signals_on([process]):
            if search is None:
                failed = _run_grid(sweep, axes, planned, seeds)
            else:
                chosen = choose_metric(metric, first, axes)
                failed = _run_search(sweep, axes, source, overrides, search, seeds, chosen, first)
        _compare(sweep)
    if failed:
        reason = sweep.record["runs"][failed[0]].get("reason", "")
        raise RunError(
            f"{len(failed)} of the runs failed: {failed[0]}: {reason}" + _more(failed), "the same command tries again"
        )
    return folder


def finished(folder: Path, table: Mapping[str, Any]) -> bool:
    """Whether a folder holds the whole run of a recipe. Raises RunError where it holds another recipe's."""
    if not (folder / "recipe.json").is_file() or not any(folder.glob("*/done.json")):
        return False
    old, new = flat(with_newer_keys(read_json(folder / "recipe.json"))), flat(table)
    best = new.get("rl.best_by") is not None
    closed = (folder / "eval" / "done.json").is_file()
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k) and not may_change(k, closed=closed, best=best)]
    if changed:
        key = changed[0]
        raise RunError(
            f"{folder} holds a run of another recipe: {key}: {old.get(key)!r} there, {new.get(key)!r} here",
            "choose another folder with -o, or remove that one",
        )
    return all((folder / step / "done.json").is_file() for step in steps_of(table))


def _run_grid(sweep: Sweep, axes: Sequence[Axis], planned: Sequence[Planned], seeds: int) -> list[str]:
    if sweep.record.get("search"):
        raise RunError(f"{sweep.folder} holds a search", "choose another folder with -o")
    waiting = [one for one in planned if not finished(sweep.folder / one.name, one.recipe.model_dump(mode="json"))]
    sizes = " x ".join(f"{len(axis.texts)} values of {axis.key}" for axis in axes)
    before = f"; {len(planned) - len(waiting)} finished before" if len(waiting) < len(planned) else ""
    sweep.terminal.note(f"{sizes} x {_seeds(seeds)} = {len(planned)} runs, into {sweep.folder}{before}")
    for line in describe(planned[0].recipe):
        sweep.terminal.note(f"each {line}")
    sweep.record |= {"axes": {axis.key: list(axis.texts) for axis in axes}, "seeds": seeds, "search": None}
    for one in planned:
        sweep.record["runs"].setdefault(one.name, {"status": "waiting"})
    sweep.save()
    done = [sweep.run(one, f"{n} of {len(planned)}") for n, one in enumerate(planned, 1)]
    return [one.name for one, well in zip(planned, done, strict=True) if not well]


def _run_search(
    sweep: Sweep,
    axes: Sequence[Axis],
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    trials: int,
    seeds: int,
    chosen: tuple[str, str | None],
    recipe: Recipe,
) -> list[str]:
    """Trial after trial; the values of one begun before stand in sweep.json, and its runs carry on."""
    load_optuna()
    metric, stage = chosen
    direction, data, failed = direction_of(metric, recipe), data_of(metric, stage, recipe), []
    spaces = {a.key: [*(["log"] if a.range.log else []), *a.texts] if a.range else list(a.texts) for a in axes}
    kept = sweep.record.get("search") or {}
    if kept and kept["axes"] != spaces:
        raise RunError(f"{sweep.folder} holds a search over other values", "choose another folder with -o")
    sweep.terminal.note(f"search: {trials} trials x {_seeds(seeds)} = {trials * seeds} runs, into {sweep.folder}")
    sweep.terminal.note(f"tuned {data}; the test side stays closed until the table at the end")
    found: list[dict[str, Any]] = kept.get("trials", [])
    sweep.record["search"] = {
        "axes": spaces,
        "metric": metric,
        "direction": direction,
        "stage": stage,
        "data": data,
        "seeds": seeds,
        "trials": found,
    }
    for number in range(trials):
        if number == len(found):
            whole = [trial for trial in found if trial["objective"] is not None]
            seed = plan(source, overrides, _corners(axes)[:1], 1)[0].recipe.seed
            found.append({"setting": propose(axes, whole, number, seed, direction), "objective": None})
            sweep.save()
        trial = found[number]
        try:
            planned = plan(source, overrides, [trial["setting"]], seeds)
        except RecipeError as error:  # two values that are right alone need not be right together
            failed.append(f"trial {number + 1}")
            sweep.note(failed[-1], "failed", str(error))
            continue
        first = number * seeds + 1
        done = [sweep.run(one, f"{first + n} of {trials * seeds}") for n, one in enumerate(planned)]
        failed += [one.name for one, well in zip(planned, done, strict=True) if not well]
        if all(done):
            trial["objective"] = fmean(_objective(sweep.folder / one.name, metric, stage) for one in planned)
            sweep.save()
    return list(dict.fromkeys(failed))


def _objective(folder: Path, metric: str, stage: str | None) -> float:
    run = read_run(folder)
    value = objective(run, metric, stage)
    if value is None:
        names = sorted({name for stage in run.curves.values() for name in stage})
        near = difflib.get_close_matches(metric, names, 3, 0.3) or names
        raise RecipeError(f"no metric {metric!r} was recorded in {folder}", f"name one such as {', '.join(near)}")
    return value


def _check(axes: Sequence[Axis], seeds: int, search: int | None, metric: str | None) -> None:
    keys = [axis.key for axis in axes]
    if not axes:
        raise RecipeError("a sweep needs a key", "write key=v1,v2,..., as in rl.lam=0.9,0.95,1.0")
    if len(set(keys)) < len(keys):
        raise RecipeError(f"the sweep names {max(keys, key=keys.count)} twice", "list all its values in one place")
    if seeds < 1 or (search is not None and search < 1):
        raise RecipeError(f"--seeds {seeds}, --search {search}: there is nothing to run", "give 1 or more")
    ranged = next((axis for axis in axes if axis.range), None)
    if search is None and ranged:
        raise RecipeError(f"{ranged.key} is a range", "list its values, or search it with --search 20")
    if search is None and metric is not None:
        raise RecipeError(f"--metric {metric} is what a search goes by", "add --search 20, or leave it out")


def _corners(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Settings in which every listed value, and both ends of every range, occur once, beside the others' first."""
    first = {axis.key: axis.texts[0] for axis in axes}
    return [first, *({**first, axis.key: text} for axis in axes for text in axis.texts[1:])]


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """One sweep at a time in a folder, its last child included. Raises RunError."""
    if (folder / "recipe.json").is_file():
        raise RunError(f"{folder} holds a single run", "choose another folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise RunError(f"cannot write in {folder}: {error.strerror}", "choose another folder with -o") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"a sweep is at work in {folder}", "wait for it, or choose another with -o") from None
        yield file.fileno()


def _opened(folder: Path) -> dict[str, Any]:
    path = folder / "sweep.json"
    record = read_json(path) if path.is_file() else {}
    runs = {n: r for n, r in record.get("runs", {}).items() if (folder / n).is_dir()}  # those of folders removed go
    return record | {"runs": runs}


def _compare(sweep: Sweep) -> None:
    if any(sweep.folder.glob("[!.]*/recipe.json")):
        found, out = compare([sweep.folder])
        show(found)
        sweep.terminal.note(f"comparison: {out / 'compare.png'}, compare.md, compare.json")


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _more(failed: Sequence[str]) -> str:
    return f" (and {', '.join(failed[1:3])}{', ...' if len(failed) > 3 else ''})" if len(failed) > 1 else ""
