"""What every program of this folder is given, and how it keeps time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import line
from benchmarks.sizes import Size

PACKAGES = ("upslope", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Job:
    """One measurement to make: its name, dtype, machine part, model folder and sizes."""

    name: str
    dtype_name: str
    device_name: str
    threads: int
    model: Path
    size: Size

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype_name]

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    def begin(self) -> None:
        """Forget what earlier programs of this process held of a GPU's memory."""
        if self.device_name == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def line(self, value: float, unit: str, *, memory_gb: float | None = None, **details: Any) -> dict[str, Any]:
        """The record of this measurement; memory_gb: of the process that did the work, where it was not this one."""
        if self.device_name == "cuda" and memory_gb is None:
            details["peak_device_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return line(self.name, "upslope", value, unit, packages=PACKAGES, memory_gb=memory_gb, **details)

    def seconds(self, function: Callable[[], Any]) -> float:
        """How long one call takes, by a clock that never goes back; a GPU's queue is waited for."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def median(self, function: Callable[[], Any], rounds: int) -> float:
        """The median time of some calls, after one that warms up."""
        function()
        return statistics.median(self.seconds(function) for _ in range(rounds))

    def in_turn(self, functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Times of several functions in alternation, so that a slow minute of the machine meets them all alike."""
        for function in functions.values():
            function()
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(self.seconds(function))
        return times

    def wait(self) -> None:
        if self.device_name == "cuda":
            torch.cuda.synchronize()
