"""Runs what is missing, each run in a process of its own as `upslope train` is, and keeps a record of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.runner import git
from results.plan import Job
from results.record import read_records, record_of, stands_for, write_record
from upslope.config import load_recipe
from upslope.errors import RunError
from upslope.training.process import Process
from upslope.training.share import begin_from
from upslope.training.sweep import finished

FROM = "shared.txt"  # beside a run's logs: from where its first stages come
COMMIT = "commit.txt"  # and the commit that began it


@dataclass
class Session:
    """What one command runs. failed: name of a run -> why it did not get to its end."""

    out: Path
    records: Path
    size: str
    plain: bool | None = None
    process: Process = field(default_factory=Process)
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> None:
        """Every run that has no record of the recipe as it is now. A failed one stops no other, Ctrl-C stops all."""
        self.process.plain = self.plain
        known = read_records(self.records)
        waiting = [job for job in jobs if not stands_for(known.get(job.name), job)]
        print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} recorded before", flush=True)
        with self.process.passing_signals_on():
            for number, job in enumerate(waiting, 1):
                if self.process.stop_requests:
                    break
                print(f"\n{number} of {len(waiting)}: {job.command}", flush=True)
                reason = self.once(job)
                if reason and not self.process.stop_requests:
                    self.failed[job.name] = reason
                    print(f"{job.name} failed: {reason}", flush=True)

    def once(self, job: Job) -> str:
        """Bring one run to its end and record it; "" where that went well."""
        folder = job.folder(self.out)
        try:
            table = load_recipe(job.recipe, [*job.overrides, *self.begun(job)]).model_dump(mode="json")
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
                if reason := self.process.run(table, folder):
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


def commit_of(folder: Path) -> str:
    """The commit that began a run."""
    return (folder / COMMIT).read_text(encoding="utf-8") if (folder / COMMIT).is_file() else ""


def same_code(folder: Path) -> bool:
    """Whether the package was then what it is now."""
    then, now = (git("rev-parse", "--verify", "-q", f"{at}:upslope") for at in (commit_of(folder), "HEAD"))
    return then == now
