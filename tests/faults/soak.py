"""`make soak`: an hour of rl on a tiny model; the memory of its processes and the work of a rollout must not grow.

    python -m tests.faults.soak [SECONDS]

A run of the real command (soaked.py) with a reward in a worker process, checkpoints every few seconds, and a SIGTERM
at the end. Its learning rate is so small that the policy stays what it is: an hour's rollouts differ by chance alone.

The rule, written before anything was measured: the hour is flat where the whole 95 % interval of each slope lies within
ALLOWED of it, per hour: memory in MB, the trainer's processor time for a rollout over that of the reference work beside
it in %, and the reference work's in the trainer over the same in a process that does nothing else, in %. The last says
that the trainer does not slow itself and its reference alike. An interval that reaches out of the bound decides
nothing, and counts as not flat.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import ROOT
from tests.conftest import make_recipe
from tests.faults.harness import to_toml
from tests.faults.machine import replace_section, where_and_when
from tests.faults.soaked import Reference
from tests.faults.tiny import tiny_files
from tests.faults.variants import REWARD
from upslope.observe.events import read_events

ALLOWED = {"MB": 5.0, "%": 5.0}  # an hour, either way
WARM_UP = 0.1  # share of the time that is left out
NOTHING_LEARNED = 1e-12  # learning rate
Z = 1.96


@dataclass(frozen=True)
class Trend:
    """A line through what was sampled: its mean, slope per hour, the 95 % interval's half width, and the two ends."""

    unit: str
    mean: float
    slope: float
    half: float
    first: float
    last: float

    @property
    def flat(self) -> bool:
        return abs(self.slope) + self.half <= ALLOWED[self.unit]

    def row(self, name: str) -> str:
        shown = (
            f"{self.first:.1f} MB | {self.last:.1f} MB" if self.unit == "MB" else f"{self.first:.3f} | {self.last:.3f}"
        )
        low, high = self.slope - self.half, self.slope + self.half
        slope = f"{self.slope:+.2f} {self.unit} an hour [{low:+.2f}, {high:+.2f}]"
        return f"| {name} | {shown} | {slope} | {'yes' if self.flat else '**no**'} |"


def trend(times: Sequence[float], values: Sequence[float], unit: str) -> Trend:
    """The least-squares line over the medians of minutes (of sixtieths, where it is less than an hour) in seconds.

    Where one minute's rest is like the next one's (r > 0), n minutes count as n (1 - r) / (1 + r) independent ones in
    the slope's standard error: Santer et al. 2000, J. Geophys. Res. 105, 7337, section 4. In %, the slope is over the
    mean. Student's t by its first term beyond the normal, z + (z^3 + z) / 4 df. Raises ValueError for under 12 medians.
    """
    begin, end = times[0], times[-1]
    width = max((end - begin) / 60, 1e-9)
    place = np.minimum(((np.array(times) - begin) / width).astype(int), 59)
    y = np.array([np.median(np.array(values)[place == p]) for p in np.unique(place)])
    x = (begin + (np.unique(place) + 0.5) * width) / 3600
    if len(y) < 12:
        raise ValueError(f"{len(y)} medians are too few for a slope")
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    total = float(rest @ rest)
    r = max(0.0, float(rest[1:] @ rest[:-1]) / total) if total else 0.0
    independent = max(len(y) * (1 - r) / (1 + r), 4.0)
    error = float(np.sqrt(total / (independent - 2) / (x @ x)))
    t = Z + (Z**3 + Z) / (4 * (independent - 2))
    scale = 100 / float(y.mean()) if unit == "%" else 1.0
    quarter = len(y) // 4
    first, last = float(np.median(y[:quarter])), float(np.median(y[-quarter:]))
    return Trend(unit, float(y.mean()), scale * slope, scale * t * error, first, last)


def memory_mb(pid: int) -> dict[str, float]:
    """Resident memory of a process and of those it started, in MB."""
    found = {}
    for number in [pid, *_children(pid)]:
        try:
            pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        found["trainer" if number == pid else "worker"] = pages * 4096 / 1e6
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


Sample = dict[str, float]


def run(work: Path, seconds: float) -> tuple[list[Sample], list[Sample], int, int]:
    """What was sampled here each second, what the trainer noted, and how many rollouts and checkpoints there were."""
    model, rows = tiny_files(work)
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "reward.py").write_text(REWARD)
    recipe = make_recipe(model)
    recipe["checkpoint_minutes"] = 0.1
    recipe["data"]["rows"] = str(work / "rows.jsonl")
    recipe["optim"]["lr"] = NOTHING_LEARNED
    recipe["rl"] |= {"reward": {"stage:reward": 1.0, f"{work}/reward.py:score": 0.1}, "steps": 10_000_000}
    (work / "soak.toml").write_text(to_toml(recipe))
    asked = ["train", str(work / "soak.toml"), "-o", str(work / "run"), "--plain"]
    command = [sys.executable, "-m", "tests.faults.soaked", str(work / "notes.jsonl"), *asked]
    reference, samples = Reference(), []
    with (work / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        began = time.monotonic()
        while time.monotonic() - began < seconds and process.poll() is None:
            time.sleep(1.0)
            samples.append({"at": time.monotonic(), "beside_s": reference()} | memory_mb(process.pid))
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    if code != 130:
        raise RuntimeError(f"the run ended with {code}: {(work / 'log').read_text()[-300:]}")
    notes = [json.loads(line) for line in (work / "notes.jsonl").read_text().splitlines()]
    events = read_events(work / "run" / "events.jsonl")
    rollouts = sum(e["kind"] == "step" and e["stage"] == "rl" for e in events)
    return samples, notes, rollouts, sum(e["kind"] == "checkpoint" for e in events)


def late(samples: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """When and what, of the samples that have it, after the warm-up."""
    begin = samples[0]["at"] + WARM_UP * (samples[-1]["at"] - samples[0]["at"])
    kept = [s for s in samples if name in s and s["at"] >= begin]
    return [s["at"] for s in kept], [s[name] for s in kept]


def trends(samples: Sequence[Sample], notes: Sequence[Sample]) -> dict[str, Trend]:
    """The slopes that the rule is about, by name."""
    paired = [note | {"ratio": note["rollout_s"] / note["reference_s"]} for note in notes]
    times, inside = late(notes, "reference_s")
    beside_at, beside = late(samples, "beside_s")
    nearest = np.minimum(np.searchsorted(beside_at, times), len(beside_at) - 1)
    shares = [one / float(np.median(beside[max(0, n - 5) : n + 6])) for one, n in zip(inside, nearest, strict=True)]
    return {
        "memory of the trainer": trend(*late(samples, "trainer"), "MB"),
        "memory of the worker": trend(*late(samples, "worker"), "MB"),
        "processor time of a rollout, in reference work": trend(*late(paired, "ratio"), "%"),
        "reference work in the trainer, in that of a process beside it": trend(times, shares, "%"),
    }


def report(found: Mapping[str, Trend], samples: Sequence[Sample], notes: Sequence[Sample]) -> list[str]:
    """The table, and what stands beside it."""
    rollout, reference = (np.array(late(notes, name)[1]) * 1000 for name in ("rollout_s", "reference_s"))
    objects, files = (late(notes, name)[1] for name in ("objects", "files"))
    quarter = len(rollout) // 4

    def ends(values: np.ndarray) -> str:
        first, last = np.median(values[:quarter]), np.median(values[-quarter:])
        return f"{first:.1f} ms in the first quarter, {last:.1f} ms in the last"

    return [
        "| | first quarter | last quarter | slope [95 % interval] | flat |",
        "|---|---|---|---|---|",
        *(found[name].row(name) for name in found),
        "",
        f"Flat is a whole interval within ±{ALLOWED['MB']:g} MB or ±{ALLOWED['%']:g} % an hour; the first "
        f"{100 * WARM_UP:.0f} % of the time are warming up. Processor time by itself, neighbours included: a rollout "
        f"{ends(rollout)}; the reference work {ends(reference)}. Python's objects in the trainer: {objects[0]:.0f} at "
        f"first, {objects[-1]:.0f} at the end; open files: {files[0]:.0f} and {files[-1]:.0f}.",
    ]


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3600.0
    torch.set_num_threads(1)
    measured = where_and_when()
    work = Path(tempfile.mkdtemp(prefix="upslope-soak-"))
    try:
        samples, notes, rollouts, checkpoints = run(work, seconds)
    finally:
        shutil.rmtree(work)
    found = trends(samples, notes)
    text = [
        f"`make soak` for {seconds / 60:.0f} min ({measured}; {os.cpu_count()} cores shared with other programs): "
        f"{rollouts} rollouts of 6 prompts, {rollouts * 6} optimizer steps, {checkpoints} checkpoints, ended by a "
        "SIGTERM, saved.",
        "",
        *report(found, samples, notes),
    ]
    replace_section("Soak", text)
    print("\n".join(text))
    sys.exit(not all(one.flat for one in found.values()))


if __name__ == "__main__":
    main()
