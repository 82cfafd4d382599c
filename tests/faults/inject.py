"""Faults put into a running program from outside: its functions and file operations are wrapped, and at the n-th event
of a phase something happens to it. The program itself knows nothing of this.

Phases: generation, rewards, log-probs, update, evaluation, checkpoint (each file operation of a save), export (those of
a finished model), files (those of logs and reports), stages (their beginnings and ends). Kinds: see Injector.fire.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.outcome import digest
from upslope.engine import Engine
from upslope.models import open as open_module
from upslope.observe.terminal import Terminal
from upslope.training import export as export_module
from upslope.training import state as state_module
from upslope.training.scoring import FunctionSource, LearnedSource
from upslope.training.state import RunState
from upslope.training.update import optimizer_tensors

PHASES = ("generation", "rewards", "log-probs", "update", "evaluation", "checkpoint", "export", "files", "stages")
COMPUTING = PHASES[:5]
KINDS = ("sigkill", "sigterm", "sigint", "sigint-twice", "memory", "full-disk", "reward")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Injector:
    """Counts the events of a run in FOLDER and strikes at one of them: the at-th (from 1) of a phase, or of a phase in
    one stage, where that is said."""

    def __init__(self, folder: Path, phase: str | None, at: int, kind: str, within: str | None = None) -> None:
        self.folder, self.phase, self.at, self.kind, self.within_stage = str(folder), phase, at, kind, within
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self.inside: list[str] = []
        self.stage = ""
        self.fired = False
        self.full = False
        self.work_after = 0  # computations that began after a signal: forward and backward passes, batches of rewards

    def event(self, phase: str, half: Callable[[], Any] | None = None) -> None:
        """One event; `half` does half of what is about to be done, for a process that dies in the middle of it."""
        self.counts[phase] += 1
        if self.fired and phase in COMPUTING:
            self.work_after += 1
        self.seen += phase == self.phase and self.within_stage in (None, self.stage)
        if phase == self.phase and self.seen == self.at and self.within_stage in (None, self.stage) and not self.fired:
            self.fired = True
            if half is not None and self.kind == "sigkill":
                half()
            self.fire()

    def fire(self) -> None:
        beside(self.folder, "fired").write_text(json.dumps([self.phase, self.at, self.kind, time.time()]))
        if self.kind == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind.startswith("sigint"):
            for _ in range(2 if self.kind.endswith("twice") else 1):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0)  # the handler runs here
        elif self.kind == "memory":
            raise MemoryError("made up by a test")
        elif self.kind == "reward" and self.stage == "eval":
            self.fired = False  # what fails in the closing table is shown there as failed, and the run goes on
        elif self.kind == "reward":
            beside(self.folder, "unwell").touch()  # from now on the user's function raises
        elif self.kind == "full-disk":
            self.fill_disk()
        elif self.kind == "clock":
            self.turn_clock_back()
        else:
            raise ValueError(self.kind)

    def fill_disk(self) -> None:
        """From now on nothing can be written under the folder: open logs become /dev/full, new files are refused."""
        self.full = True
        full = os.open("/dev/full", os.O_RDWR)
        for number in [int(name) for name in os.listdir("/proc/self/fd")]:
            try:
                if os.readlink(f"/proc/self/fd/{number}").startswith(self.folder + "/") and number != full:
                    os.dup2(full, number)
            except OSError:
                continue

    def turn_clock_back(self) -> None:
        """From now on the clock on the wall runs backwards, from an hour ago."""
        then = time.time()
        real = time.time
        time.time = lambda: then - 3600.0 - 10.0 * (real() - then)

    def place(self, default: str) -> str:
        return self.inside[-1] if self.inside else default

    def within(self, phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """An event before and one after each call; what is called inside counts to this phase."""

        def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                self.event(phase)
                self.inside.append(phase)
                try:
                    result = inner(*args, **options)
                finally:
                    self.inside.pop()
                self.event(phase)
                return result

            return wrapped

        return wrap


class TornFile:
    """A file whose writes are events, and can stop half way."""

    def __init__(self, file: Any, injector: Injector) -> None:
        self.file, self.injector = file, injector

    def write(self, data: Any) -> Any:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.injector.event(self.injector.place("files"), half)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> TornFile:
        return self

    def __exit__(self, *details: Any) -> None:
        self.file.close()


def beside(folder: str | Path, name: str) -> Path:
    """What the harness notes about a run: beside its folder, never in it."""
    return Path(f"{folder}.{name}")


def install(injector: Injector) -> None:
    """Wrap the program. For the life of this process: it is one that was started for one run."""
    for kind in open_module.KINDS.values():
        _wrap(kind.runner, "prefill", injector.within("generation"))
        _wrap(kind.runner, "step", injector.within("generation"))
        _wrap(kind.trunk, "hidden", lambda inner: _forward_passes(injector, inner))
    _wrap(Engine, "load", injector.within("generation"))
    _wrap(FunctionSource, "__call__", injector.within("rewards"))
    _wrap(LearnedSource, "__call__", injector.within("rewards"))
    _wrap(torch.Tensor, "backward", injector.within("update"))
    _wrap(torch.optim.AdamW, "step", injector.within("update"))
    _wrap(state_module, "save_checkpoint", injector.within("checkpoint"))
    _wrap(export_module, "write_model", injector.within("export"))
    _wrap(RunState, "restore", injector.within("stages"))
    _wrap(RunState, "finish", lambda inner: injector.within("stages")(_noting_state(injector, inner)))
    _wrap(Terminal, "stage", lambda inner: _stage_changes(injector, inner))
    _wrap(pathlib.Path, "open", lambda inner: _torn_files(injector, inner))
    _wrap(os, "fsync", lambda inner: _syncs(injector, inner))
    sys.addaudithook(lambda name, arguments: _file_operation(injector, name, arguments))


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, wrapper(getattr(owner, name)))


def _forward_passes(injector: Injector, inner: Callable[..., Any]) -> Callable[..., Any]:
    def hidden(*args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            injector.event(injector.place("log-probs" if injector.stage == "rl" else "evaluation"))
        return inner(*args, **options)

    return hidden


def _stage_changes(injector: Injector, inner: Callable[..., Any]) -> Callable[..., Any]:
    def stage(terminal: Terminal, name: str, status: str) -> None:
        injector.stage = name
        if name == "eval":
            beside(injector.folder, "unwell").unlink(missing_ok=True)
        injector.event("stages")
        inner(terminal, name, status)

    return stage


def _noting_state(injector: Injector, inner: Callable[..., Any]) -> Callable[..., Any]:
    """The state that a stage ends with, noted before its checkpoints are removed."""

    def finish(state: RunState, *args: Any, **options: Any) -> Any:
        found = {
            "model": digest(state.model.state_dict()),
            "optimizer": digest(optimizer_tensors(state.model, state.optimizer)),
            "counters": [state.step, state.rollout, state.extra],
        }
        path = beside(injector.folder, f"{state.stage}.state")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, json.dumps(found, sort_keys=True).encode())
        os.close(descriptor)
        return inner(state, *args, **options)

    return finish


def _torn_files(injector: Injector, inner: Callable[..., Any]) -> Callable[..., Any]:
    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = inner(path, mode, *args, **options)
        under = str(path).startswith(injector.folder + "/")
        return TornFile(file, injector) if under and set(mode) & set("w+") else file

    return opened


def _syncs(injector: Injector, inner: Callable[..., Any]) -> Callable[..., Any]:
    def fsync(number: int) -> None:
        injector.event(injector.place("files"))
        if injector.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(number)

    return fsync


def _file_operation(injector: Injector, name: str, arguments: tuple[Any, ...]) -> None:
    if name not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        return
    path = str(arguments[0])
    if not path.startswith(injector.folder + "/"):
        return
    if name == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
        return
    injector.event(injector.place("files"))
    if injector.full and name in ("open", "os.mkdir"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
