"""The plan: which recipes are run, by which algorithms, with which seeds, and what the page says of them.

    [[row]]            a recipe, started by supervision and improved by RL
    name, recipe, metric, set         metric: the row of the closing table that counts; set: key=value for all its runs
    smoke              key=value that make it a matter of seconds
    [[row.run]]        name (of the algorithm), seeds, set

    [[study]]          arms of one recipe beside each other
    name, recipe, metric, set, smoke, columns
    [[study.run]]      name, seeds, set; after: the arm whose last model of the same seed this one begins with;
                       or as, title: the runs of a row's algorithm ("GROUP-ARM") beside those of the study

Texts for people are tables of the languages of the page: { en = "...", zh = "..." }.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upslope.config import load_recipe, read_recipe, shipped_recipes
from upslope.errors import RecipeError

ROOT = Path(__file__).parent.parent
PLAN = ROOT / "results" / "plan.toml"
LANGUAGES = ("en", "zh")
KINDS = ("row", "study")
COMMON = {"name", "recipe", "metric", "title", "model", "set", "smoke", "run"}
KEYS = {"row": COMMON, "study": {*COMMON, "columns"}}
RUN_KEYS = {"name", "seeds", "set", "after", "title"}
AS_KEYS = {"as", "title"}
Text = Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """One run of the plan. group: the row or study; arm: the algorithm, or what an arm is called.

    after, stage: the arm, and the last stage of its runs, whose model of the same seed this one begins with.
    """

    group: str
    arm: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    after: str | None = None
    stage: str = ""

    @property
    def name(self) -> str:
        return f"{self.group}-{self.arm}-{self.seed}"

    @property
    def before(self) -> str:
        """The folder of the run whose last model this one begins with."""
        return f"{self.group}-{self.after}-{self.seed}"

    @property
    def command(self) -> str:
        """What anyone types to run it."""
        begun = [f"model=RUNS/{self.before}/{self.stage}/model"] if self.after else []
        words = [f"-s {_quoted(setting)}" for setting in (*self.overrides, *begun)]
        path = Path(self.recipe)
        recipe = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        return " ".join([f"upslope train {recipe}", *words, f"-o RUNS/{self.name}"])

    def folder(self, out: Path) -> Path:
        return out / self.name

    def digest(self) -> str:
        """What a record must have been made of to stand for this run: the recipe, comments aside, and the settings."""
        content = [read_recipe(self.recipe), *self.overrides, self.after]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Arm:
    """The runs of one algorithm, or of one arm of a study, over its seeds."""

    name: str
    title: Text
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Group:
    """A row's or a study's arms, and what the page says of it. columns: measures of the training, of a study."""

    name: str
    kind: str
    metric: str
    title: Text
    model: Text
    arms: tuple[Arm, ...]
    columns: tuple[str, ...] = ()

    @property
    def own_jobs(self) -> list[Job]:
        """Its runs, without those of another group that it shows too."""
        return [job for arm in self.arms for job in arm.jobs if job.group == self.name]


def read_plan(path: Path = PLAN, *, smoke: bool = False) -> list[Group]:
    """All groups in the order of the file. Raises RecipeError for what is no plan."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read the plan {path}: {error}", "mend it") from None
    strange = [key for key in raw if key not in KINDS]
    if strange:
        raise RecipeError(f"{path} has {strange[0]!r}", "write [[row]] and [[study]]")
    groups: list[Group] = []
    for kind in KINDS:
        groups += [_group(kind, table, path, smoke, groups) for table in raw.get(kind, [])]
    names = [job.name for group in groups for job in group.own_jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise RecipeError(f"{path} has two runs called {twice}", "name one otherwise")
    return groups


def chosen(groups: Sequence[Group], names: Sequence[str]) -> list[Job]:
    """The runs of the groups, arms ("GROUP-ARM") or runs ("GROUP-ARM-SEED") that are named, in the plan's order.

    Without names all: the first seeds of everything before any second one. Raises RecipeError for a name that is none.
    """
    jobs = [job for group in groups for job in group.own_jobs]
    for name in names:
        if not any(name in _names(job) for job in jobs):
            known = ", ".join(group.name for group in groups)
            raise RecipeError(f"nothing in the plan is called {name!r}", f"choose from {known}")
    found = [job for job in jobs if not names or any(name in _names(job) for name in names)]
    return sorted(found, key=lambda job: _turn(job, jobs))


def _names(job: Job) -> tuple[str, str, str]:
    return job.group, f"{job.group}-{job.arm}", job.name


def _turn(job: Job, jobs: Sequence[Job]) -> int:
    """How many runs of the same arm stand before this one: seeds are run in turns."""
    return sum(1 for other in jobs[: jobs.index(job)] if (other.group, other.arm) == (job.group, job.arm))


def _group(kind: str, table: Mapping[str, Any], path: Path, smoke: bool, before: Sequence[Group]) -> Group:
    name = str(table.get("name", "?"))
    where = f"{path.name}, {kind} {name}"
    _check(table, KEYS[kind], {"name", "recipe", "metric", "title", "run"}, where)
    recipe = str(table["recipe"])
    beside = path.parent / recipe
    recipe = str(beside) if recipe not in shipped_recipes() and beside.is_file() else recipe
    shared = [*table.get("set", []), *(table.get("smoke", []) if smoke else [])]
    arms = tuple(
        _of_row(run, before, where) if "as" in run else _arm(name, recipe, shared, run, table["run"], smoke, where)
        for run in table["run"]
    )
    known = {arm.name for arm in arms}
    for job in (job for arm in arms for job in arm.jobs if job.group == name):
        if job.after is not None and job.after not in known:
            raise RecipeError(f"{where}: {job.arm} comes after {job.after!r}, which is no run of it", "name one")
        load_recipe(recipe, [*job.overrides])  # a mistake is told before anything runs
    return Group(
        name,
        kind,
        str(table["metric"]),
        _text(table["title"], where),
        _text(table.get("model", ""), where),
        arms,
        tuple(table.get("columns", ())),
    )


def _arm(
    group: str,
    recipe: str,
    shared: Sequence[str],
    run: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    smoke: bool,
    where: str,
) -> Arm:
    _check(run, RUN_KEYS, {"name", "seeds"}, f"{where}, run")
    seeds = run["seeds"][:1] if smoke else run["seeds"]
    after = run.get("after")
    before = next((other for other in runs if other.get("name") == after), None) if after else None
    stage = load_recipe(recipe, [*shared, *before.get("set", [])]).policy_stages[-1] if before else ""
    jobs = tuple(
        Job(group, run["name"], seed, recipe, (*shared, *run.get("set", []), f"seed={seed}"), after, stage)
        for seed in seeds
    )
    return Arm(run["name"], _text(run.get("title", run["name"]), where), jobs)


def _of_row(run: Mapping[str, Any], before: Sequence[Group], where: str) -> Arm:
    """The runs of a row's algorithm, under another title."""
    _check(run, AS_KEYS, AS_KEYS, f"{where}, run")
    for group in before:
        for arm in group.arms:
            if f"{group.name}-{arm.name}" == run["as"]:
                return Arm(arm.name, _text(run["title"], where), arm.jobs)
    raise RecipeError(f"{where} shows {run['as']!r}, which no row before it has", "name GROUP-ARM")


def _check(table: Mapping[str, Any], allowed: set[str], needed: set[str], where: str) -> None:
    for key in table:
        if key not in allowed:
            raise RecipeError(f"{where} has a key {key!r}", f"choose from {', '.join(sorted(allowed))}")
    for key in sorted(needed - table.keys()):
        raise RecipeError(f"{where} has no {key}", "add it")


def _text(value: Any, where: str) -> Text:
    """A text in every language; one that is plain is the same in all."""
    texts = dict.fromkeys(LANGUAGES, value) if isinstance(value, str) else dict(value)
    if set(texts) != set(LANGUAGES):
        raise RecipeError(f"{where}: a text has the languages {', '.join(texts)}", f"write {', '.join(LANGUAGES)}")
    return texts


def _quoted(setting: str) -> str:
    return f"'{setting}'" if any(c in setting for c in ' {}[]"') else setting
