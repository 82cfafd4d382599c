"""`upslope train` itself on recipes written here: a step is what lies between two step records of its log."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import read_rows
from benchmarks.ours.job import Job
from upslope.observe.events import read_events

ROOT = Path(__file__).parent.parent.parent
COMMAND = (sys.executable, "-c", "from upslope.cli import main; main()")
POLL_S = 0.005
LEARNING_RATE = 1e-5
REWARD = '''"""A reward that costs nothing, the same for upslope and its peers."""


def score(prompts, completions, rows):
    return [float(len(set(text)) % 17) / 17 for text in completions]
'''


@dataclass(frozen=True)
class Trained:
    """A finished run: when each step record of a stage was written, and the records."""

    started: float
    stamps: list[float]
    steps: list[dict[str, float]]
    closing: dict[str, float]

    @property
    def intervals(self) -> list[float]:
        """Seconds of every step but the first."""
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


def train(job: Job, stage: str, tables: dict[str, Any], folder: Path) -> Trained:
    """Run a recipe and stamp the steps of a stage as they are recorded. Raises RuntimeError where the command fails."""
    folder.mkdir(parents=True)
    (folder / "reward.py").write_text(REWARD)
    recipe = {
        "name": job.name,
        "model": str(job.model.resolve()),
        "dtype": job.dtype_name,
        "seed": 0,
        "checkpoint_minutes": 1000.0,
        "optim": {"lr": LEARNING_RATE, "micro_tokens": job.size.train_micro[0]},
        "eval": {"prompts": 1, "judges": [], "show": 0},
        **tables,
    }
    (folder / "recipe.toml").write_text(toml(recipe))
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
    if job.device_name == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    out, log = folder / "run", folder / "output.txt"
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, "train", str(folder / "recipe.toml"), "-o", str(out), "--plain"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        stamps = watch(process, out / "events.jsonl", stage)
    if process.returncode:
        raise RuntimeError(f"upslope train ended with {process.returncode}: {log.read_text()[-2000:]}")
    events = read_events(out / "events.jsonl")
    steps = [e["metrics"] for e in events if e["kind"] == "step" and e["stage"] == stage]
    if len(steps) != len(stamps):
        raise RuntimeError(f"{len(steps)} steps were recorded and {len(stamps)} seen")
    closing = json.loads((out / stage / "done.json").read_text())["metrics"]
    return Trained(started, stamps, steps, closing)


def watch(process: subprocess.Popen[Any], path: Path, stage: str) -> list[float]:
    """The moment at which each step record of a stage appears in a file, until the process ends."""
    stamps: list[float] = []
    mark = f'{{"kind": "step", "stage": "{stage}"'.encode()
    seen, rest = 0, b""
    running = True
    while running:
        running = process.poll() is None
        size = path.stat().st_size if path.exists() else 0
        if size > seen:
            now = time.perf_counter()
            with path.open("rb") as file:
                file.seek(seen)
                added = file.read()
            seen += len(added)
            *lines, rest = (rest + added).split(b"\n")
            stamps += [now] * sum(line.startswith(mark) for line in lines)
        elif running:
            time.sleep(POLL_S)
    return stamps


def toml(table: dict[str, Any], name: str = "") -> str:
    """A recipe's tables as TOML: strings, numbers and lists are written as in JSON."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    text = "\n".join([*([f"[{name}]"] if name else []), *plain]) + "\n\n"
    for key, value in table.items():
        if isinstance(value, dict):
            text += toml(value, f"{name}.{key}" if name else key)
    return text


def rows_table(job: Job, name: str, max_tokens: int, **columns: str) -> dict[str, Any]:
    path = (job.model.parent / "rows" / f"{name}.jsonl").resolve()
    return {"rows": str(path), "max_tokens": max_tokens, "valid": 0.1, "test": 0.1, **columns}


def grpo(job: Job) -> dict[str, Any]:
    """A GRPO step: sample, score, one update."""
    size = job.size
    rl = {
        "algorithm": "grpo",
        "kl": 0.0,  # no reference model, as TRL's default
        "reward": "reward.py:score",
        "steps": size.grpo_steps,
        "prompts": size.grpo_prompts,
        "samples": size.grpo_samples,
    }
    data = rows_table(job, "prompts", size.prompt + size.completion, prompt="prompt")
    return rl_step(job, {"data": data, "rl": rl}, size.grpo_prompts * size.grpo_samples)


def ppo(job: Job) -> dict[str, Any]:
    """A PPO batch with a learned reward and a reference: sample, score, every epoch's minibatches."""
    size = job.size
    rl = {
        "algorithm": "ppo",
        "reward": "stage:reward",
        "critic": job.name.removeprefix("ppo-"),
        "kl": 0.05,
        "steps": size.ppo_steps,
        "prompts": size.ppo_episodes,
        "epochs": size.ppo_epochs,
        "minibatches": size.ppo_minibatches,
    }
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    data = rows_table(job, "prompts", size.prompt + size.completion, **columns)
    reward = {"steps": 1, "batch": 2, "eval_pairs": 4}  # the reward model of the run: its size counts, not its wit
    return rl_step(job, {"data": data, "reward": reward, "rl": rl}, size.ppo_episodes)


def rl_step(job: Job, tables: dict[str, Any], episodes: int) -> dict[str, Any]:
    tables["rl"]["max_tokens"] = job.size.completion
    tables["limits"] = {"slots": job.size.slots, "max_failures": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        tables["rl"]["reward"] = tables["rl"]["reward"].replace("reward.py", f"{folder}/made/reward.py")
        found = train(job, "rl", tables, Path(folder) / "made")
    later = found.steps[1:]
    parts = {
        name: statistics.median(step[f"time/{name}_s"] for step in later)
        for name in ("step", "rollout", "prepare", "update")
    }
    seconds = statistics.median(found.intervals)
    return job.line(
        seconds,
        "s/step",
        **memory(found.closing),
        episodes_per_s=episodes / seconds,
        updates=later[-1]["optim/updates"],
        intervals=found.intervals,
        first_step_s=found.steps[0]["time/step_s"],
        metrics={name: later[-1][name] for name in sorted(later[-1]) if "length" in name or "gap" in name},
        **{f"{name}_s": value for name, value in parts.items()},
    )


def memory(closing: dict[str, float]) -> dict[str, float]:
    """What the process that trained held at most, and of a GPU's memory where it had one."""
    found = {"memory_gb": closing["memory/peak_gb"]}
    if "memory/gpu_peak_gb" in closing:
        found["peak_device_gb"] = closing["memory/gpu_peak_gb"]
    return found


def sft(job: Job) -> dict[str, Any]:
    """Optimizer steps on texts of ragged lengths: real tokens/s, padding never counted."""
    size = job.size
    stage = {"steps": size.fit_steps, "batch": size.sft_batch, "eval_examples": 1}
    with tempfile.TemporaryDirectory() as folder:
        data = rows_table(job, "sft", size.sft_high, text="text")
        found = train(job, "sft", {"data": data, "sft": stage}, Path(folder) / "made")
    mean = statistics.mean(len(row["ids"]) for row in read_rows(job.model, "sft"))
    trained = [step["tokens/trained"] for step in found.steps[1:]]
    rates = [tokens / seconds for tokens, seconds in zip(trained, found.intervals, strict=True)]
    return job.line(
        statistics.median(rates),
        "tokens/s",
        **memory(found.closing),
        intervals=found.intervals,
        tokens=trained,
        mean_length=mean,
    )


def pairs(job: Job) -> dict[str, Any]:
    """Optimizer steps of a reward model, or of DPO, on pairs of ragged sides."""
    size = job.size
    stage = "reward" if job.name == "reward" else "preference"
    table: dict[str, Any] = {"steps": size.fit_steps, "batch": size.pair_batch, "eval_pairs": 2}
    if stage == "preference":
        table["loss"] = "dpo"
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    with tempfile.TemporaryDirectory() as folder:
        data = rows_table(job, "pairs", size.sft_high, **columns)
        found = train(job, stage, {"data": data, stage: table}, Path(folder) / "made")
    rows = read_rows(job.model, "pairs")
    mean = statistics.mean(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    return job.line(
        size.pair_batch / statistics.median(found.intervals),
        "pairs/s",
        **memory(found.closing),
        intervals=found.intervals,
        mean_pair_tokens=mean,
    )


def start(job: Job) -> dict[str, Any]:
    """Seconds of `upslope --help`, and from the command to the first finished training step of a cached model."""

    def help_text() -> None:
        subprocess.run([*COMMAND, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    helped = job.median(help_text, job.size.rounds)
    stage = {"steps": 1, "batch": job.size.sft_batch, "eval_examples": 1}
    tables = {"data": rows_table(job, "sft", job.size.sft_high, text="text"), "sft": stage}
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(min(3, job.size.rounds)):
            found = train(job, "sft", tables, Path(folder) / str(attempt))
            first.append(found.stamps[0] - found.started)
    return job.line(helped, "s", first_step_s=statistics.median(first[1:]), first_steps=first)
