"""The record of a run: one JSON object a line, appended; everything shown or reported is made from it.

    {"kind": "step", "stage": "rl", "step": 12, "metrics": {"reward/mean": 0.4, ...}}

Kinds: run, stage, step, eval, samples, alarm, account, table, prompts, episode, checkpoint (its seconds and bytes).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from upslope.errors import RunError


class EventLog:
    """An append-only file of events. keep_bytes cuts it back on opening, so that a resumed run writes no line twice."""

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        self.path = path
        try:
            self.file = path.open("r+b" if path.exists() else "w+b")
            size = self.file.seek(0, os.SEEK_END)
            if size < keep_bytes:
                self.file.close()
                raise RunError(
                    f"{path} has {size} bytes where a checkpoint remembers {keep_bytes}", "start anew with -o"
                )
            self.file.truncate(keep_bytes)
            self.file.seek(keep_bytes)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}", "choose another folder with -o") from None
        self.offset = keep_bytes

    def write(self, kind: str, *, stage: str | None = None, step: int | None = None, **fields: Any) -> dict[str, Any]:
        """Append one event and return it. Numbers that are not finite become null and are named in "nonfinite"."""
        event: dict[str, Any] = {"kind": kind}
        if stage is not None:
            event["stage"] = stage
        if step is not None:
            event["step"] = step
        bad: list[str] = []
        event |= {key: finite(value, key, bad) for key, value in fields.items()}
        if bad:
            event["nonfinite"] = bad
        line = json.dumps(event, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror}", "free space; the same command carries on"
            ) from None
        self.offset += len(line)
        return event

    def sync(self) -> None:
        """Put everything written so far on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a file. A torn last line is left out; any other that is not JSON raises RunError."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}", "name a run folder") from None
    events = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "kind" not in event:
                raise ValueError("not an event")
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number} is not an event: {error}", "remove that line") from None
        events.append(event)
    return events


def finite(value: Any, name: str, bad: list[str]) -> Any:
    """A value with null for every number in it that is not finite, as JSON needs it; bad gets their names."""
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(name)
        return None
    if isinstance(value, dict):
        return {key: finite(item, f"{name}.{key}", bad) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, f"{name}.{i}", bad) for i, item in enumerate(value)]
    return value
