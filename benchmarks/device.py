"""`python -m benchmarks.device --out DIR`: everything about a GPU in some minutes, the most important first.

Each part has a limit of its own, and what it found is written at once: a part that fails, or that no time is left for,
is named as not measured and costs no other. DIR gets MODEL.json for each model (to be put into results/), profile.txt,
log.txt and errors.txt. With --wheels, the peers' packages are put beside this interpreter's own, without a network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan import TASKS
from benchmarks.runner import ROOT, Session
from benchmarks.sizes import SIZES, Size
from benchmarks.table import markdown, missing, newest


@dataclass(frozen=True)
class Part:
    """Some tasks on a model (which one of the size's), and the seconds that each of its processes may take."""

    model: int
    tasks: tuple[str, ...]
    seconds: float


# Tasks without a peer share one process: what takes longest is its start.
PARTS = (
    Part(0, ("bandwidth", "decode", "packed", "gap", "profile"), 90),
    Part(1, ("bandwidth", "decode", "packed", "gap", "profile"), 90),
    Part(2, ("bandwidth", "decode", "packed", "gap"), 90),
    Part(0, ("grpo",), 90),
    Part(0, ("ppo",), 100),
    Part(1, ("grpo",), 100),
    Part(1, ("ppo",), 120),
    Part(0, ("generate", "logprobs"), 60),
)
SAVED = ("grpo", "ppo", "generate", "logprobs")  # tasks that read a model from a folder
WRAPPER = '#!/bin/sh\nPYTHONPATH="{packages}:$PYTHONPATH" exec "{python}" "$@"\n'
MAKE = """import sys
from pathlib import Path
from benchmarks.models import prepare
from benchmarks.sizes import SIZES
from upslope.kernels import cpu
cpu.available()  # compiles what a run's own arithmetic on the CPU uses
prepare(Path(sys.argv[1]), SIZES[sys.argv[2]], sys.argv[3:])
"""
WHEELS = {"venv": "now", "venv-ppo": "ppo"}  # a peer's environment -> the folder of its wheels


def main() -> int:
    args = arguments()
    size, begun = SIZES[args.size], time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    peers = install(args.wheels, args.work / "peers") if args.wheels else args.peers
    names = list(size.models)
    parts = [part for part in PARTS if part.model < len(names) and (not args.tasks or set(part.tasks) & args.tasks)]
    making = make_models(args.work, size, sorted({names[p.model] for p in parts if set(p.tasks) & set(SAVED)}))
    sessions = {
        name: Session(args.work / size.name / name, size, peers, args.dtype, args.device, args.threads, repeats=1)
        for name in names
    }
    log = Log(args.out, args.commit)
    for part in parts:
        if making is not None and set(part.tasks) & set(SAVED):
            log.note(f"models made: status {making.wait()}")
            making = None
        session = sessions[names[part.model]]
        for tasks in together(part.tasks):
            left = 60 * args.minutes - (time.monotonic() - begun)
            measure(session, tasks, min(part.seconds, left), log)
            log.write(names[part.model], session)
    if making is not None:
        making.kill()
    for name, session in sessions.items():
        if session.runs:
            log.show(name, session)
    return 0


def together(tasks: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Tasks that one process does, the others each by itself."""
    alone = [task for task in tasks if task in SAVED]
    joined = tuple(task for task in tasks if task not in SAVED)
    return [*([joined] if joined else []), *((task,) for task in alone)]


def measure(session: Session, tasks: tuple[str, ...], seconds: float, log: Log) -> None:
    """One process for tasks that share it; else one for each program of the task."""
    programs = [program for task in tasks for program in TASKS[task]]
    if len(tasks) > 1 or tasks[0] not in SAVED:
        log.note(f"{session.model.name}: {', '.join(tasks)}, {seconds:.0f} s at most")
        session.together(tasks, seconds)
        return
    for program in programs:
        key = f"{program.by} {program.name}"
        if not session.can_run(program):
            log.note(f"{session.model.name}: {key}: {session.missing[key]}")
        elif seconds < 1:
            session.missing[key] = "no time was left"
        else:
            begun = time.monotonic()
            session.once(tasks[0], program, 0, limit=seconds)
            log.note(f"{session.model.name}: {key} took {time.monotonic() - begun:.0f} s")


class Log:
    """What is kept of the parts, written as soon as it is there."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.folder, self.commit = folder, commit
        self.begun = time.monotonic()
        self.profiles: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def note(self, text: str) -> None:
        line = f"{time.monotonic() - self.begun:6.1f} s  {text}"
        print(line, flush=True)
        with (self.folder / "log.txt").open("a") as file:
            file.write(line + "\n")

    def write(self, name: str, session: Session) -> None:
        """The result so far; tables of profiles go to a file of their own."""
        result = session.result(name)
        if self.commit:  # the caller knows better than a copy of the tree
            result |= {"commit": self.commit, "changed_files": []}
        for run in result["runs"]:
            table = run["details"].pop("table", None)
            if table is not None:
                self.profiles[f"{name}: {run['what']}"] = table
        self.errors |= {f"{name}: {key}": text for key, text in session.errors.items()}
        (self.folder / "errors.txt").write_text(sections(self.errors))
        (self.folder / "profile.txt").write_text(sections(self.profiles))
        (self.folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

    def show(self, name: str, session: Session) -> None:
        result = session.result(name)
        measured = newest([result])
        self.note(f"{name}\n\n{markdown(measured)}\n")
        for line in missing([result], measured):
            self.note(f"not measured: {line}")
        for key, why in session.missing.items():
            self.note(f"{name}: {key}: {why}")


def sections(texts: dict[str, str]) -> str:
    return "\n\n".join(f"== {title}\n{text}" for title, text in texts.items()) + "\n"


def make_models(work: Path, size: Size, names: list[str]) -> subprocess.Popen[Any] | None:
    """Start making rows and models, beside what needs none of them."""
    if not names:
        return None
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    return subprocess.Popen([sys.executable, "-c", MAKE, str(work), size.name, *names], cwd=ROOT, env=environment)


def install(wheels: Path, folder: Path) -> Path:
    """An interpreter for each peer whose wheels are there: this one, with the peer's packages before its own."""
    for environment, name in WHEELS.items():
        packages, program = folder.resolve() / name, folder / environment / "bin" / "python"
        found = sorted(str(path) for path in (wheels / name).glob("*.whl"))
        if program.is_file() or not found:
            continue
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(packages), *found], check=True)
        program.parent.mkdir(parents=True)
        program.write_text(WRAPPER.format(packages=packages, python=sys.executable))
        program.chmod(0o755)
    return folder


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="nothing is begun after these")
    parser.add_argument("--tasks", type=lambda text: set(text.split(",")), default=set(), help="only parts with these")
    parser.add_argument("--wheels", type=Path, help=f"folder with the peers' wheels: {', '.join(WHEELS.values())}")
    parser.add_argument("--peers", type=Path, help="or the folder that benchmarks.setup made")
    parser.add_argument("--commit", default="", help="of this code, without a change: where git cannot be asked")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmarks", help="where models and rows are made")
    args = parser.parse_args()
    unknown = args.tasks - set(TASKS)
    if unknown:
        parser.error(f"nothing is called {sorted(unknown)[0]!r}: choose from {', '.join(TASKS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
