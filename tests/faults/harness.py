"""Runs that are struck and started again: what the tests and the campaign share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import ROOT
from tests.conftest import save_tiny_model
from tests.faults.inject import beside
from tests.faults.outcome import differences, outcome
from tests.faults.variants import PAIRS, REWARD, VARIANTS, recipe_of, write_models
from upslope.text.tokenizer import Tokenizer

STOP_S = 5.0  # what a stop that was asked for may take


@dataclass
class Strike:
    """What happens to one start of a run."""

    phase: str | None = None
    at: int = 0
    kind: str = ""
    kill_after: float | None = None


@dataclass
class Ended:
    """How one start ended."""

    code: int
    seconds: float
    said: str
    fired: bool = False
    seconds_after: float = 0.0
    hung: bool = False


@dataclass
class Harness:
    """A fork server with the files that its runs read. Use as a context manager."""

    work: Path
    model: Path
    rows: list[dict[str, str]]
    references: dict[str, tuple[dict[str, Any], dict[str, int], float]] = field(default_factory=dict)

    last_starts: list[tuple[Strike, Ended]] = field(default_factory=list)

    def __enter__(self) -> Harness:
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        (self.work / "reward.py").write_text(REWARD)
        (self.work / "teacher").mkdir(exist_ok=True)
        save_tiny_model(self.work / "teacher", Tokenizer.load(self.model), seed=1)
        write_models(self.work, self.model, self.rows)
        for name in (*VARIANTS, *PAIRS):
            (self.work / f"{name}.toml").write_text(to_toml(recipe_of(name, self.model, self.work)))
        command = [sys.executable, "-m", "tests.faults.child", str(self.model)]
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            stdin=pipe,
            stdout=pipe,
            start_new_session=True,  # a Ctrl-C is not for it
        )
        assert self.server.stdout and self.server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *details: Any) -> None:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.close()
        self.server.wait(timeout=200)
        self.server.stdout.close()

    def start(self, variant: str, folder: Path, strike: Strike | None = None, minutes: float = 0.0) -> Ended:
        """The command, once; always the same but for checkpoint_minutes, which may change between two starts."""
        ask: dict[str, Any] = dict(vars(strike or Strike()))
        ask |= {"folder": str(folder), "recipe": str(self.work / f"{variant}.toml"), "log": f"{folder}.log"}
        ask["arguments"] = ["-s", f"checkpoint_minutes={minutes}"]
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(ask) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return Ended(said=Path(f"{folder}.log").read_text(), **answer)

    @staticmethod
    def counts(folder: Path) -> dict[str, int]:
        """How many events each phase of the last start had, which ended by itself."""
        found: dict[str, int] = json.loads(beside(folder, "counts").read_text())
        return found

    def work_after(self, folder: Path) -> int:
        """How many computations began after the strike of that start."""
        return self.counts(folder)["work after"]

    def reference(self, variant: str) -> tuple[dict[str, Any], dict[str, int], float]:
        """Of an unbroken run: its outcome, how many events each phase has, and its seconds."""
        if variant not in self.references:
            folder = self.work / f"unbroken-{variant}"
            ended = self.start(variant, folder)
            assert ended.code == 0, ended.said
            self.references[variant] = (outcome(folder), self.counts(folder), ended.seconds)
        return self.references[variant]

    def trial(self, variant: str, folder: Path, strikes: list[Strike], minutes: float = 0.0) -> list[str]:
        """Strike one start after another, then start once more in peace. Returns what is not as it should be."""
        expected, _, _ = self.reference(variant)
        wrong = []
        self.last_starts = [(strike, self.start(variant, folder, strike, minutes)) for strike in strikes]
        for strike, ended in self.last_starts:
            wrong += problems(strike, ended)
        last = self.start(variant, folder, minutes=minutes)
        if last.code != 0:
            return [*wrong, f"the last start ended with {last.code}: {last.said[-500:]}"]
        return wrong + differences(outcome(folder), expected)


def problems(strike: Strike, ended: Ended) -> list[str]:
    """What is wrong with the way in which a struck start ended; one that ended before its strike is none."""
    if ended.hung:
        return [f"{strike}: hung"]
    if strike.kill_after is not None:
        return [] if ended.code in (0, -9) else [f"{strike}: ended with {ended.code}: {ended.said[-300:]}"]
    if not ended.fired:
        return [] if ended.code == 0 else [f"{strike}: ended with {ended.code} unstruck: {ended.said[-300:]}"]
    allowed = {
        "sigkill": (-9,),
        "sigterm": (130, 0, -15),  # -15: before the run has begun to listen
        "sigint": (130, 0),
        "sigint-twice": (130,),
        "memory": (2,),
        "full-disk": (2, 0),
        "reward": (2, 0),
        "clock": (0,),
    }[strike.kind]
    wrong = []
    if ended.code not in allowed:
        wrong.append(f"{strike}: ended with {ended.code}, not {allowed}: {ended.said[-300:]}")
    if "Traceback" in ended.said:
        wrong.append(f"{strike}: a traceback: {ended.said[-500:]}")
    if strike.kind.startswith("sig") and ended.seconds_after > STOP_S:
        wrong.append(f"{strike}: took {ended.seconds_after:.1f} s to stop")
    return wrong


def to_toml(recipe: Mapping[str, Any]) -> str:
    """A recipe as a file: its tables are flat, but for values that are tables."""
    lines = [f"{key} = {_value(value)}" for key, value in recipe.items() if not isinstance(value, dict)]
    for table, content in recipe.items():
        if isinstance(content, dict):
            lines += [f"[{table}]", *(f"{key} = {_value(value)}" for key, value in content.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {json.dumps(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
