"""Where the time goes, by torch's profiler: kernels on a GPU, operators on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from benchmarks.ours.job import Job

SHOWN = 30


@dataclass(frozen=True)
class Profile:
    """Seconds by the clock, and of each kernel how often it ran and its seconds in all.

    The clock was read in a run without the profiler, which slows the host down.
    """

    seconds: float
    kernels: dict[str, tuple[float, float]]

    @property
    def busy(self) -> float:
        """Seconds in which kernels ran, one after the other."""
        return sum(seconds for _, seconds in self.kernels.values())

    def less(self, other: Profile, steps: int) -> Profile:
        """What this one has beyond another, for each of the steps that it has more."""
        rest = {}
        for name, (count, seconds) in self.kernels.items():
            known = other.kernels.get(name, (0.0, 0.0))
            if count > known[0] and seconds > known[1]:
                rest[name] = ((count - known[0]) / steps, (seconds - known[1]) / steps)
        return Profile((self.seconds - other.seconds) / steps, rest)

    def table(self) -> str:
        """The kernels that take longest: milliseconds, share of the busy time, how often."""
        ranked = sorted(self.kernels.items(), key=lambda item: -item[1][1])
        lines = [f"{1e3 * self.seconds:.3f} ms by the clock, {1e3 * self.busy:.3f} ms busy, {len(ranked)} kernels"]
        for name, (count, seconds) in ranked[:SHOWN]:
            share = seconds / self.busy if self.busy else 0.0
            lines.append(f"{1e3 * seconds:10.4f} ms {share:6.1%} {count:8.1f} x  {name[:130]}")
        left = sum(seconds for _, (_, seconds) in ranked[SHOWN:])
        if left:
            lines.append(f"{1e3 * left:10.4f} ms        the other {len(ranked) - SHOWN}")
        return "\n".join(lines)


def profile(job: Job, function: Callable[[], Any]) -> Profile:
    """One call, warm: the caller has made one before."""
    seconds = min(job.seconds(function) for _ in range(2))
    cuda = job.device_name == "cuda"
    with torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        function()
        job.wait()
    kernels: dict[str, tuple[float, float]] = {}
    for entry in found.key_averages():
        on_device = str(entry.device_type).endswith("CUDA")
        if on_device == cuda:
            took = entry.self_device_time_total if cuda else entry.self_cpu_time_total
            if took > 0:
                kernels[entry.key] = (float(entry.count), 1e-6 * took)
    return Profile(seconds, kernels)
