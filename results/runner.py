"""Runs what is missing, each run in a process of its own as `upslope train` is, and keeps a record of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.runner import git
from results.plan import Job
from results.record import read_records, record_of, stands_for, write_record
from upslope.config import load_recipe
from upslope.errors import RunError
from upslope.training.process import Process, passing_signals_on
from upslope.training.share import begin_from
from upslope.training.sweep import finished

FROM = "shared.txt"  # beside a run's logs: from where its first stages come
COMMIT = "commit.txt"  # and the commit that began it


@dataclass
class Session:
    """What one command runs. at_once: runs at a time; failed: name of a run -> why it did not get to its end."""

    out: Path
    records: Path
    size: str
    plain: bool | None = None
    at_once: int = 1
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False

    def run(self, jobs: Sequence[Job]) -> None:
        """Every run that has no record of the recipe as it is now. A failed one stops no other, Ctrl-C stops all.

        Runs of one recipe and seed wait for each other, for what they share; of several at once each has its part of
        the cores, and its lines go to OUT/NAME.log.
        """
        known = read_records(self.records)
        waiting = [job for job in jobs if not stands_for(known.get(job.name), job)]
        print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} recorded before", flush=True)
        numbers = {job.name: f"{number} of {len(waiting)}" for number, job in enumerate(waiting, 1)}
        processes = [Process(self.plain) for _ in range(self.at_once)]
        if self.at_once > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.at_once)))
        todo = iter(chains(waiting))  # of all: the next is whoever's is idle

        def work(process: Process) -> None:
            for chain in todo:
                for job in chain:
                    if not process.stop_requests:
                        self.one(job, numbers[job.name], process)

        with passing_signals_on(processes), ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(work, processes))
        self.stopped = any(process.stop_requests for process in processes)

    def one(self, job: Job, number: str, process: Process) -> None:
        """Run it and say how it went."""
        process.output = self.out / f"{job.name}.log" if self.at_once > 1 else None
        print(f"\n{number}: {job.command}" + (f" > {process.output}" if process.output else ""), flush=True)
        reason = self.once(job, process)
        if reason and not process.stop_requests:
            self.failed[job.name] = reason
            print(f"{job.name} failed: {reason}", flush=True)

    def once(self, job: Job, process: Process) -> str:
        """Bring one run to its end and record it; "" where that went well."""
        folder = job.folder(self.out)
        try:
            recipe = load_recipe(job.recipe, [*job.overrides, *self.begun(job)])
            table = recipe.model_dump(mode="json")
            if not finished(folder, table):
                if folder.exists() and not same_code(folder):
                    then = commit_of(folder)[:7] or "no known commit"
                    remedy = f"delete {folder} to run it anew, or check that commit out to finish it"
                    raise RunError(f"{job.name} was begun with the code of {then}, not today's", remedy)
                self.out.mkdir(parents=True, exist_ok=True)
                others = [path.parent for path in sorted(self.out.glob("*/recipe.json")) if path.parent != folder]
                others = [other for other in others if same_code(other)]
                if shared := begin_from(others, folder, table):
                    (folder / FROM).write_text(shared, encoding="utf-8")
                    print(shared, flush=True)
                folder.mkdir(exist_ok=True)
                (folder / COMMIT).write_text(commit_of(folder) or git("rev-parse", "HEAD"), encoding="utf-8")
                if reason := process.run(recipe.model_dump(mode="json", exclude_unset=True), folder):
                    return reason
        except RunError as error:
            return str(error)
        shared = (folder / FROM).read_text(encoding="utf-8") if (folder / FROM).is_file() else ""
        path = write_record(record_of(job, folder, self.size, shared, commit_of(folder)), self.records)
        print(f"recorded: {path}", flush=True)
        return ""

    def begun(self, job: Job) -> list[str]:
        """The setting that lets a run begin with another's last model. Raises RunError where that is not finished."""
        if job.after is None:
            return []
        before = self.out / job.before
        if not (before / "recipe.json").is_file():
            raise RunError(f"{job.before} has not been run", "run it first, into the same folder")
        model = before / job.stage / "model"
        if not model.is_dir():
            raise RunError(f"{job.before} is not finished", "run it to its end first")
        return [f"model={model.resolve()}"]


def chains(jobs: Sequence[Job]) -> list[list[Job]]:
    """The runs of one recipe and seed in their order; first comes what has the first run."""
    found: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        found.setdefault((job.recipe, job.seed), []).append(job)
    return list(found.values())


def commit_of(folder: Path) -> str:
    """The commit that began a run."""
    return (folder / COMMIT).read_text(encoding="utf-8") if (folder / COMMIT).is_file() else ""


def same_code(folder: Path) -> bool:
    """Whether the package was then what it is now."""
    then, now = (git("rev-parse", "--verify", "-q", f"{at}:upslope") for at in (commit_of(folder), "HEAD"))
    return then == now
