"""`make soak`: an hour of rl on a tiny model; the memory of its processes and the work of a rollout must not grow.

    python -m tests.faults.soak [SECONDS]

A run of the real command with a reward in a worker process, checkpoints every few seconds, and a SIGTERM at the end.
Slopes are least-squares lines over what was sampled each second after the first tenth, which is left to warming up.
The work of a rollout is processor time, since other programs on the machine stretch the time on the clock.
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
from pathlib import Path

import numpy as np

from tests.checkpoints import ROOT
from tests.conftest import make_recipe
from tests.faults.harness import to_toml
from tests.faults.machine import replace_section, where_and_when
from tests.faults.tiny import tiny_files
from tests.faults.variants import REWARD
from upslope.observe.events import read_events

ALLOWED_MB_PER_HOUR = 20.0
ALLOWED_DRIFT = 0.25  # of the trainer's processor time for a rollout, last quarter over first


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


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used, in user and system mode."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Rollouts:
    """How many rollouts a growing events file tells of; each byte is read once."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.count = path, 0, 0

    def so_far(self) -> int:
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.place)
                new = file.read()
            whole = new.rpartition(b"\n")[0]
            self.place += len(whole)
            self.count += whole.count(b'{"kind": "step", "stage": "rl"')
        return self.count


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def run(work: Path, seconds: float) -> tuple[list[tuple[float, dict[str, float]]], list[dict[str, float]], int]:
    """What was sampled and when, the metrics of every rollout, and how many checkpoints there were."""
    model, rows = tiny_files(work)
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "reward.py").write_text(REWARD)
    recipe = make_recipe(model)
    recipe["checkpoint_minutes"] = 0.1
    recipe["data"]["rows"] = str(work / "rows.jsonl")
    recipe["rl"] |= {"reward": {"stage:reward": 1.0, f"{work}/reward.py:score": 0.1}, "steps": 10_000_000}
    (work / "soak.toml").write_text(to_toml(recipe))
    code = "from upslope.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(work / "soak.toml"), "-o", str(work / "run"), "--plain"]
    rollouts = Rollouts(work / "run" / "events.jsonl")
    with (work / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        began, samples = time.monotonic(), []
        while time.monotonic() - began < seconds and process.poll() is None:
            time.sleep(1.0)
            counted = {"processor": processor_seconds(process.pid), "rollouts": float(rollouts.so_far())}
            samples.append((time.monotonic() - began, memory_mb(process.pid) | counted))
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    said = (work / "log").read_text()[-300:]
    if code != 130:
        raise RuntimeError(f"the run ended with {code}: {said}")
    events = read_events(work / "run" / "events.jsonl")
    steps = [e["metrics"] for e in events if e["kind"] == "step" and e["stage"] == "rl"]
    return samples, steps, sum(e["kind"] == "checkpoint" for e in events)


def slope_per_hour(samples: list[tuple[float, dict[str, float]]], name: str) -> tuple[float, float, float]:
    """MB per hour after the first tenth of the time, and the first and last of the values that it was fitted to."""
    late = [(t, m[name]) for t, m in samples[len(samples) // 10 :] if name in m]
    times, values = np.array([t for t, _ in late]), np.array([v for _, v in late])
    return float(np.polyfit(times, values, 1)[0]) * 3600, float(values[0]), float(values[-1])


def work_of_a_rollout(samples: list[tuple[float, dict[str, float]]]) -> tuple[float, float]:
    """Processor seconds of the trainer for one rollout, in the first and the last quarter after the first tenth."""
    late = [m for _, m in samples[len(samples) // 10 :] if m["rollouts"]]
    quarter = len(late) // 4

    def between(one: dict[str, float], other: dict[str, float]) -> float:
        return (other["processor"] - one["processor"]) / (other["rollouts"] - one["rollouts"])

    return between(late[0], late[quarter]), between(late[-quarter - 1], late[-1])


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3600.0
    measured = where_and_when()
    work = Path(tempfile.mkdtemp(prefix="upslope-soak-"))
    try:
        samples, steps, checkpoints = run(work, seconds)
    finally:
        shutil.rmtree(work)
    slopes = {name: slope_per_hour(samples, name) for name in ("trainer", "worker")}
    times = np.array([m["time/step_s"] for m in steps])
    quarter = len(times) // 4
    first, last = float(np.median(times[:quarter])), float(np.median(times[-quarter:]))
    work_first, work_last = work_of_a_rollout(samples)
    drift = work_last / work_first - 1
    text = [
        f"`make soak` for {seconds / 60:.0f} min ({measured}): {len(steps)} rollouts of 6 prompts, "
        f"{len(steps) * 6} optimizer steps, {checkpoints} checkpoints, ended by a SIGTERM, saved.",
        "",
        "| | after the first tenth | at the end | slope |",
        "|---|---|---|---|",
        *(f"| memory of the {n} | {a:.1f} MB | {b:.1f} MB | {s:+.1f} MB an hour |" for n, (s, a, b) in slopes.items()),
        f"| processor time of a rollout, first and last quarter | {1000 * work_first:.1f} ms "
        f"| {1000 * work_last:.1f} ms | {100 * drift:+.1f} % |",
        f"| median time of a rollout on the clock, likewise | {1000 * first:.1f} ms | {1000 * last:.1f} ms "
        f"| {100 * (last / first - 1):+.1f} % |",
    ]
    replace_section("Soak", text)
    print("\n".join(text))
    sys.exit(drift > ALLOWED_DRIFT or any(slope > ALLOWED_MB_PER_HOUR for slope, _, _ in slopes.values()))


if __name__ == "__main__":
    main()
