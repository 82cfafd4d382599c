"""What is kept of a finished run: one small JSON file, from which the page is made without the run's folder."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.runner import git, machine
from results.plan import Job
from upslope.observe.events import read_events
from upslope.observe.runs import measures, read_run

RECORDS = Path(__file__).parent / "records"
SHOWN = 4  # prompts whose completions before and after are kept
OUTPUT = (":!results/records", ":!docs")  # what measuring itself writes is no change of the code


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of the run -> its record."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def stands_for(record: Mapping[str, Any] | None, job: Job) -> bool:
    """Whether a record is of the run that the plan asks for now, of this recipe and these settings."""
    return record is not None and record["digest"] == job.digest()


def record_of(job: Job, folder: Path, size: str, shared: str, commit: str) -> dict[str, Any]:
    """Everything that the page says of a run.

    shared: which stages were taken from another run, and from which; commit: the one that began it.
    """
    run, events = read_run(folder), read_events(folder / "events.jsonl")
    closing = json.loads((folder / "eval" / "done.json").read_text(encoding="utf-8"))
    facts = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    table: dict[str, dict[str, list[float | None]]] = closing["intervals"]
    shown = next(e for e in reversed(events) if e["kind"] == "prompts")["samples"][:SHOWN]
    stages = {name: stage_cost(name, folder, events) for name in run.settings["stages"].split("+")}
    return {
        "format": 1,
        "group": job.group,
        "arm": job.arm,
        "seed": job.seed,
        "size": size,
        "digest": job.digest(),
        "command": job.command,
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
        "changed_files": git("status", "--porcelain", "--", "upslope", "results", *OUTPUT).splitlines(),
        "machine": machine(facts["device"]) | {key: facts[key] for key in ("device", "dtype", "threads")},
        "shared": shared,
        "prompts": closing["prompts"],
        "table": {name: {label: _rounded(ends) for label, ends in row.items()} for name, row in table.items()},
        "eval_s": closing["seconds"],
        "stages": stages,
        "measures": {name: value for name, value in measures(run).items() if not name.startswith("time/")},
        "alarms": [e["message"] for e in events if e["kind"] == "alarm"],
        "shown": shown,
    }


def stage_cost(stage: str, folder: Path, events: list[dict[str, Any]]) -> dict[str, float]:
    """What a stage took: samples (examples, pairs or episodes), tokens read, operations, seconds, memory."""
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    done = json.loads((folder / stage / "done.json").read_text(encoding="utf-8"))["metrics"]
    found = [e["metrics"] for e in events if e.get("stage") == stage and e["kind"] in ("step", "eval")]
    table = recipe[stage]
    if stage == "rl":
        samples = sum(1 for e in read_events(folder / "episodes.jsonl") if e["stage"] == stage)
    else:
        samples = table["steps"] * table["batch"]
    return {
        "samples": samples,
        "tokens_read": sum(m.get("tokens/read", 0.0) for m in found),
        "tflop": round(sum(m.get("compute/tflop", 0.0) for m in found), 4),
        "seconds": round(done["time/stage_s"], 3),
        "peak_gb": round(done["memory/peak_gb"], 2),
    }


def _rounded(ends: list[float | None]) -> list[float | None]:
    """Six decimals: more than any interval here is wide."""
    return [None if x is None else round(x, 6) for x in ends]


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """One file a run: a later record of the same run takes its place."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['group']}-{record['arm']}-{record['seed']}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def total(record: Mapping[str, Any], key: str, *, rl: bool | None = None) -> float:
    """A cost over the stages of a run: of all, of rl, or of those that are not rl; of peaks the highest."""
    chosen = [c[key] for s, c in record["stages"].items() if rl is None or (s == "rl") == rl]
    return max(chosen, default=0.0) if key == "peak_gb" else sum(chosen)
