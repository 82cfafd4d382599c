"""Runs programs in turn, each in a fresh process, and keeps every record and every failure."""

from __future__ import annotations

import datetime
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours.job import PACKAGES
from benchmarks.plan import PEERS, TASKS, UPSLOPE, Program
from benchmarks.record import read_failures, read_line, read_lines, versions
from benchmarks.sizes import Size

ROOT = Path(__file__).parent.parent
LIMIT_S = 3600.0  # of one process
OUTPUT = (":!benchmarks/results", ":!benchmarks/README.md")  # what measuring itself writes is no change of the code
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Done:
    """A process that ended by itself (status None: at its limit), and what it printed."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line of its errors, or of what else it printed."""
        return (self.stderr.strip() or self.stdout.strip() or "nothing was printed").splitlines()[-1]


@dataclass
class Session:
    """What one command measures, and what came of it."""

    model: Path
    size: Size
    peers: Path | None
    dtype: str
    device: str
    threads: int
    repeats: int
    runs: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # "by name" -> why it was not measured
    errors: dict[str, str] = field(default_factory=dict)  # the same -> the end of what a failed one said

    def measure(self, tasks: list[str]) -> None:
        """Every program of each task in turn, `repeats` times: A B A B, not A A B B."""
        for task in tasks:
            programs = [p for p in TASKS[task] if self.can_run(p)]
            for repeat in range(self.repeats):
                for program in programs:
                    self.once(task, program, repeat)

    def can_run(self, program: Program) -> bool:
        """Whether a program can be measured here; where not, why is noted."""
        if program.by == UPSLOPE:
            return True
        peer = PEERS[program.by]
        reason = None
        if self.device not in peer.devices:
            reason = f"its build here has no {self.device}"
        elif self.peers is None:
            reason = "no folder of peers was named with --peers"
        elif not self.interpreter(program.by).is_file():
            reason = f"not installed: {peer.environment} is missing in the folder of peers"
        if reason is not None:
            self.missing[f"{program.by} {program.name}"] = reason
        return reason is None

    def interpreter(self, by: str) -> Path:
        if by == UPSLOPE:
            return Path(sys.executable)
        assert self.peers is not None
        return self.peers.resolve() / PEERS[by].environment / "bin" / "python"

    def once(self, task: str, program: Program, repeat: int, limit: float = LIMIT_S) -> None:
        """One process; its record, or the reason why there is none."""
        module = "benchmarks.ours" if program.by == UPSLOPE else PEERS[program.by].module
        key = f"{program.by} {program.name}"
        done = self.call(self.interpreter(program.by), module, [program.name], limit)
        found = read_line(done.stdout)
        if done.status is None:
            self.missing[key] = f"took more than {limit:g} s"
        elif done.status or found is None:
            self.missing[key] = f"failed in repeat {repeat + 1} with status {done.status}: {done.last[:300]}"
        else:
            self.runs.append({"task": task, "repeat": repeat, "process_s": done.seconds, **found})
            print(f"{key} {repeat + 1}: {found['value']:.4g} {found['unit']}, {found['peak_gb']:.2f} GB", flush=True)
            return
        self.errors[key] = done.stderr[-4000:]
        print(f"{key}: {self.missing[key]}", flush=True)

    def together(self, tasks: Sequence[str], limit: float) -> None:
        """All of upslope's programs of some tasks in one process, once: a start costs more than most of them."""
        names = {program.name: task for task in tasks for program in TASKS[task] if program.by == UPSLOPE}
        done = self.call(self.interpreter(UPSLOPE), "benchmarks.ours", list(names), limit)
        records = {found["what"]: found for found in read_lines(done.stdout)}
        why = read_failures(done.stdout)
        for name, task in names.items():
            if name in records:
                self.runs.append({"task": task, "repeat": 0, "process_s": done.seconds, **records[name]})
            else:
                late = f"no time was left of {limit:.0f} s" if done.status is None else f"status {done.status}"
                self.missing[f"{UPSLOPE} {name}"] = why.get(name, f"{late}: {done.last[:300]}")
        if done.status != 0:
            self.errors[f"{UPSLOPE} {', '.join(tasks)}"] = done.stderr[-4000:]

    def call(self, python: Path, module: str, names: Sequence[str], limit: float) -> Done:
        """Run a module's programs in a process group of its own, which is ended whole when the limit is over."""
        command = [str(python), "-m", module, *names, "--model", str(self.model)]
        command += ["--dtype", self.dtype, "--device", self.device, "--threads", str(self.threads)]
        command += ["--size", self.size.name]
        environment = os.environ | QUIET | {"OMP_NUM_THREADS": str(self.threads)}
        begun = time.perf_counter()
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=max(limit, 0.0))
                status: int | None = process.returncode
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
                out, err = process.communicate()
                status = None
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
        return Done(status, out, err, time.perf_counter() - begun)

    def result(self, model_name: str) -> dict[str, Any]:
        """Everything that was seen, with where and of what."""
        return {
            "format": 1,
            "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": machine(self.device),
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "model": model_name,
            "size": self.size.name,
            "repeats": self.repeats,
            "commit": git("rev-parse", "HEAD"),
            "changed_files": git("status", "--porcelain", "--", "upslope", "benchmarks", *OUTPUT).splitlines(),
            "versions": versions(PACKAGES),
            "runs": self.runs,
            "not_measured": self.missing,
        }


def git(*words: str) -> str:
    """What git says of this checkout; nothing where there is none."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def machine(device: str) -> dict[str, Any]:
    """The machine without its name: processor, cores, memory, system, and the GPU where that is measured."""
    facts: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    try:
        info = Path("/proc/cpuinfo").read_text()
        memory = Path("/proc/meminfo").read_text()
    except OSError:
        return facts
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", info, re.MULTILINE)
    total = re.search(r"^MemTotal:\s*(\d+) kB", memory, re.MULTILINE)
    if model:
        facts["processor"] = model.group(1)
    if flags:
        facts["bf16"] = sorted(f for f in flags.group(1).split() if f in ("avx512_bf16", "amx_bf16"))
    if total:
        facts["memory_gb"] = round(int(total.group(1)) * 1024 / 1e9, 1)
    return facts


def file_name(result: dict[str, Any]) -> str:
    """The day and the kind of machine, never its name."""
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['processor']} {machine['cores']} cores"
    words = f"{where} {result['device']} {result['dtype']}"
    if result["size"] != "full":
        words += f" {result['size']}"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{words} {result['model']}".lower()).strip("-")
    return f"{result['made'][:10]}-{slug}"


def free_path(folder: Path, name: str) -> Path:
    """A file that does not exist yet: what was measured is never written over."""
    path, number = folder / f"{name}.json", 2
    while path.exists():
        path, number = folder / f"{name}-{number}.json", number + 1
    return path
