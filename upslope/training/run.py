"""A run in its folder: what is written, what is shown, and whether it should stop.

OUT/recipe.json          the resolved recipe, the seed of every stage's randomness
OUT/rows.json            the sizes of the sides and a print of their rows, which a resumed run must find again
OUT/events.jsonl         everything that happened, one JSON object a line
OUT/episodes.jsonl       every completion that was trained on: ids, log-probabilities, rewards
OUT/start/model/         what a table [model] made: random weights and a trained tokenizer
OUT/expert/samples.jsonl what the stage expert sampled and which of it was kept
OUT/STAGE/checkpoints/   while a stage runs
OUT/STAGE/model/         when it is done: Hugging Face layout
OUT/STAGE/done.json      its closing metrics, and how long the logs were
OUT/eval/answers.jsonl   the closing evaluation prompt by prompt: every contender's completion and scores
OUT/tensorboard/, OUT/report.html
"""

from __future__ import annotations

import json
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from upslope.checkpoint import RunLock, atomic_write_text, load_checkpoint
from upslope.config import CLOSING, Recipe, may_change, with_newer_keys
from upslope.errors import RunError
from upslope.kernels import cpu
from upslope.kernels.allocator import keep_freed_memory
from upslope.observe.events import EventLog, finite, read_events
from upslope.observe.runs import read_json
from upslope.observe.tensorboard import TensorBoardLog
from upslope.observe.terminal import Terminal
from upslope.training.signals import signals_to
from upslope.version import VERSION

WORK_PER_TOKEN = {"forward": 1.0, "train": 3.0}  # a backward pass costs twice the forward one


class Run:
    """One run folder, opened: logs cut back to the last checkpoint, display started, stop requests noticed."""

    def __init__(self, recipe: Recipe, folder: Path, *, plain: bool | None = None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.stop_requested = False
        self.changed: list[str] = []  # of the recipe, since the run was begun
        self.at_stake = False  # whether a stage holds what is not on the disk: a stop must then wait for a safe point
        _make_folder(folder)
        self.lock = RunLock(folder)
        try:
            self._open(plain)
        except BaseException:
            self.lock.release()
            raise

    def _open(self, plain: bool | None) -> None:
        self._check_same_recipe()
        for stage in self.recipe.stages:
            if self.done(stage):  # a process killed while it closed the stage may have left them
                shutil.rmtree(self.stage_folder(stage) / "checkpoints", ignore_errors=True)
        sizes = self._log_sizes()
        keep_freed_memory()
        self.facts = self._machine_facts()
        self.log = EventLog(self.folder / "events.jsonl", keep_bytes=sizes["events"])
        self.episodes = EventLog(self.folder / "episodes.jsonl", keep_bytes=sizes["episodes"])
        kept = read_events(self.log.path)
        self.accounts = {(e.get("stage"), e["text"]) for e in kept if e["kind"] == "account"}
        self.tensorboard = TensorBoardLog(self.folder / "tensorboard")
        self.terminal = Terminal(plain)
        self.terminal.start(self.recipe.steps)
        self.plan: dict[str, float] = {}
        self._stage_start: tuple[str, float, float] | None = None
        if not kept:
            self.record("run", recipe=self.recipe.model_dump(mode="json"), versions=versions(), machine=self.facts)
        elif self.changed:
            self.account(f"the recipe has changed: {'; '.join(self.changed)}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products, decided once for the whole run."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.facts["dtype"]]

    @property
    def device(self) -> torch.device:
        return torch.device(self.facts["device"])

    def stage_folder(self, stage: str) -> Path:
        return self.folder / stage

    def done(self, stage: str) -> dict[str, Any] | None:
        """The closing record of a finished stage, or None."""
        path = self.stage_folder(stage) / "done.json"
        return read_json(path) if path.is_file() else None

    def mark_done(self, stage: str, metrics: Mapping[str, Any], **more: Any) -> None:
        """Write a stage's closing record: its metrics, and what else is known of them."""
        bad: list[str] = []
        record = {"metrics": finite(dict(metrics), "metrics", bad), **finite(more, "", bad), "logs": self.log_sizes()}
        record |= {"nonfinite": bad} if bad else {}
        atomic_write_text(self.stage_folder(stage) / "done.json", json.dumps(record, indent=1))

    def log_sizes(self) -> dict[str, int]:
        """Bytes that are safely in the logs: what a checkpoint remembers, to cut back to on resume."""
        self.log.sync()
        self.episodes.sync()
        return {"events": self.log.offset, "episodes": self.episodes.offset}

    def record(self, kind: str, *, stage: str | None = None, step: int | None = None, **fields: Any) -> None:
        """Write one event and show it."""
        event = self.log.write(kind, stage=stage, step=step, **fields)
        self.terminal.event(event)
        if kind in ("step", "eval"):
            self.tensorboard.event(event)

    def account(self, text: str, stage: str | None = None, examples: Sequence[str] = ()) -> None:
        """Say what became of the data; a resumed run, which prepares it anew, records nothing twice.

        examples: one dropped row for each reason, for the log.
        """
        if (stage, text) not in self.accounts:
            self.accounts.add((stage, text))
            self.record("account", stage=stage, text=text, examples=list(examples))

    def progress(self, stage: str, done: float, total: float, phase: str) -> None:
        """Show how far a stage is, with the time left for it and for the whole run at the speed seen so far."""
        now = time.monotonic()
        if self._stage_start is None or self._stage_start[0] != stage:
            self._stage_start = (stage, now, done)
        _, began, done_then = self._stage_start
        if done <= done_then:
            self.terminal.progress(stage, done, total, None, phase)
            return
        pace = (now - began) / (done - done_then)
        stage_left = pace * (total - done)
        order = list(self.plan)
        later = order[order.index(stage) + 1 :] if stage in order else []
        work_pace = pace * total / max(self.plan.get(stage, 0.0), 1.0)
        run_left = stage_left + work_pace * sum(self.plan[s] for s in later if not self.done(s))
        self.terminal.progress(stage, done, total, run_left, phase)

    def should_stop(self) -> bool:
        return self.stop_requested

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """First Ctrl-C or SIGTERM: finish at the next safe point, saved. Second, or nothing at stake: stop at once."""

        def ask(number: int, _frame: FrameType | None) -> None:
            if self.stop_requested or not self.at_stake:
                raise KeyboardInterrupt
            self.stop_requested = True
            name = signal.Signals(number).name
            self.terminal.note(f"{name}: saving at the next safe point; again stops at once")

        with signals_to(ask):
            yield

    def close(self) -> None:
        self.terminal.close()
        self.tensorboard.close()
        self.log.close()
        self.episodes.close()
        self.lock.release()

    def _check_same_recipe(self) -> None:
        path = self.folder / "recipe.json"
        new = self.recipe.model_dump(mode="json")
        if not path.is_file():
            if (self.folder / "events.jsonl").exists():
                raise RunError(f"{self.folder} holds a run without a recipe.json", "choose another folder with -o")
            atomic_write_text(path, json.dumps(new, indent=1))
            return
        changed = _differences(with_newer_keys(read_json(path)), new)
        closed = bool(self.done("eval"))
        best = self.recipe.rl is not None and self.recipe.rl.best_by is not None
        refused = [key for key in changed if not may_change(key, closed=closed, best=best)]
        if refused and not has_progress(self.folder):  # a first try that came to nothing holds nothing to keep
            (self.folder / "machine.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder / "start", ignore_errors=True)
        elif refused:
            more = f" and {len(refused) - 2} more" if len(refused) > 2 else ""
            again = closed and all(key in CLOSING for key in refused)
            raise RunError(
                f"{self.folder} holds a run of another recipe: {'; '.join(changed[k] for k in refused[:2])}{more}",
                "upslope eval makes the table of a finished run again"
                if again
                else "choose another folder with -o, or remove that one",
            )
        elif changed:
            self.changed = [text for key, text in changed.items() if key in CLOSING]
        if changed:
            atomic_write_text(path, json.dumps(new, indent=1))

    def _log_sizes(self) -> dict[str, int]:
        for stage in reversed([*self.recipe.stages, "eval"]):
            folder = self.stage_folder(stage)
            record = self.done(stage)
            if record:
                return dict(record["logs"])
            if (folder / "checkpoints").is_dir():
                checkpoint = load_checkpoint(folder / "checkpoints")
                if checkpoint:
                    return dict(checkpoint.state["logs"])
        return {"events": 0, "episodes": 0}

    def describe_machine(self) -> str:
        """What the run computes on, and how, for the terminal."""
        facts = self.facts
        between = "compiled kernels" if facts["kernels"] else "torch's own operations"
        if facts["device"] == "cpu" and not facts["kernels"]:
            between += " (with the compiler g++ it would be faster)"
        return f"{facts['processor']}; products of matrices in {facts['dtype']}, {between} between; weights in fp32"

    def _machine_facts(self) -> dict[str, Any]:
        """Where the run runs; decided at its first start and kept, so that a resumed run computes alike.

        Only whether the kernels could be compiled is asked anew: without them it goes on, equal but for rounding.
        """
        path = self.folder / "machine.json"
        facts: dict[str, Any]
        if path.is_file():
            facts = read_json(path)
            if facts["device"] == "cuda" and not torch.cuda.is_available():
                raise RunError(
                    "this run began on a GPU and there is none here", "resume it there, or start anew with -o"
                )
            torch.set_num_threads(facts["threads"])
            return facts | {"kernels": facts["device"] == "cpu" and cpu.available()}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.recipe.dtype if self.recipe.dtype != "auto" else fast_dtype(device)
        facts = {
            "device": device,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "kernels": device == "cpu" and cpu.available(),
            "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
            "system": platform.platform(terse=True),
        }
        atomic_write_text(path, json.dumps(facts, indent=1))
        return facts


def has_progress(folder: Path) -> bool:
    """Whether a run has anything to lose: a finished stage, a checkpoint, samples."""
    return any(any(folder.glob(pattern)) for pattern in ("*/done.json", "*/checkpoints/*", "*/samples.jsonl"))


def fast_dtype(device: str) -> str:
    """bf16 where its matrix product is at least 1.5 times as fast as fp32's, by trying both for some milliseconds."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 1024, dtype=dtype)
        w = torch.ones(1024, 1024, dtype=dtype)
        trials = []
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            trials.append(time.perf_counter() - start)
        seconds[dtype] = min(trials)
    return "bf16" if seconds[torch.bfloat16] * 1.5 < seconds[torch.float32] else "fp32"


def versions() -> dict[str, str]:
    return {"upslope": VERSION, "torch": torch.__version__, "python": platform.python_version()}


def processor() -> str:
    """The processor's name as the system tells it, and how many threads are used."""
    name, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory() -> dict[str, float]:
    """The most memory that this process has held, and of a GPU's where it uses one, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = {"memory/peak_gb": peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9}
    if torch.cuda.is_initialized():
        held["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return held


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}", "choose another with -o") from None


def _differences(old: Any, new: Any, where: str = "") -> dict[str, str]:
    """Key -> what it is in two recipes, of the keys that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, str] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            found |= _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return found
    return {} if old == new else {where: f"{where}: {old!r} there, {new!r} here"}
