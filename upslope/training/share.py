"""Stages that two runs of a sweep have in common are run once: the second run begins after them.

Only whole stages at the start, with the same seed, data, model and tables, are taken over; from there on the second run
is what it would have been, for a run that is resumed after a stage ends where an unbroken one ends.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upslope.config import STAGES
from upslope.observe.runs import read_json, steps_of

NO_MATTER = ("name", "optim", "eval", "limits", "checkpoint_minutes")  # a stage's own table holds the optim it goes by


def begin_from(others: Sequence[Path], folder: Path, table: Mapping[str, Any]) -> str:
    """Give a run that has not begun the early stages of the run that has most of them; says so in a line, or ""."""
    if folder.exists():
        return ""
    found = [(common_stages(other, table), other) for other in others if (other / "recipe.json").is_file()]
    stages, other = max(found, key=lambda pair: len(pair[0]), default=([], folder))
    if not stages:
        return ""
    said = f"{', '.join(stages)}: taken from {other.name}, where nothing before them was set otherwise"
    beside = folder.with_name(f".{folder.name}")  # takes its name when it is whole
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for name in ("machine.json", "rows.json"):  # it computes as that did, and learns from the rows that that did
        if (other / name).is_file():
            shutil.copyfile(other / name, beside / name)
    (beside / "recipe.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    moved = _copy_logs(other, beside, table, stages[-1], said)
    if (other / "start").is_dir():  # the model that both begin with
        shutil.copytree(other / "start", beside / "start", copy_function=_link)
    for stage in stages:
        ignore = shutil.ignore_patterns("done.json", "checkpoints")
        shutil.copytree(other / stage, beside / stage, copy_function=_link, ignore=ignore)
        done = read_json(other / stage / "done.json")
        done["logs"]["events"] += moved
        (beside / stage / "done.json").write_text(json.dumps(done, indent=1), encoding="utf-8")
    os.replace(beside, folder)
    return said


def common_stages(other: Path, table: Mapping[str, Any]) -> list[str]:
    """The first stages of a recipe, the last one left out, that another folder has finished with the same settings."""
    old = read_json(other / "recipe.json")
    chooses = (table.get("rl") or {}).get("best_by")  # by what [eval] says is measured on the way
    rest = [key for key in {**old, **table} if key not in (*STAGES, *NO_MATTER) or (key == "eval" and chooses)]
    if any(old.get(key) != table.get(key) for key in rest):
        return []
    found: list[str] = []
    for stage in [step for step in steps_of(table) if step in STAGES][:-1]:
        earlier = STAGES[: STAGES.index(stage) + 1]
        same = all(old.get(name) == table.get(name) for name in earlier)
        if not same or not (other / stage / "done.json").is_file():
            break
        found.append(stage)
    return found


def _copy_logs(other: Path, beside: Path, table: Mapping[str, Any], stage: str, said: str) -> int:
    """The logs up to a stage's end, under the new recipe; returns by how many bytes the events have grown."""
    sizes = read_json(other / stage / "done.json")["logs"]
    first, _, events = (other / "events.jsonl").read_bytes()[: sizes["events"]].partition(b"\n")
    told = {"kind": "account", "stage": stage, "text": said}
    lines = [{**json.loads(first), "recipe": table}, told]
    head = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "surrogatepass")
    (beside / "events.jsonl").write_bytes(head + events)
    (beside / "episodes.jsonl").write_bytes((other / "episodes.jsonl").read_bytes()[: sizes["episodes"]])
    return len(head) - len(first) - 1


def _link(source: str, target: str) -> None:
    """A second name of a finished file where the disk allows it: models are large and are not written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
