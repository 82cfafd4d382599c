"""Every algorithm on both tasks and three seeds, and the table of docs/algorithms.md: `make learning`."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.learning.tasks import MAX_KL, TASKS, VARIANTS, Outcome, held, learn, learned, recipe_of
from upslope.training.run import processor

DOCS = Path(__file__).parent.parent.parent / "docs"
STEPS = {"bandit": 30, "rule": 60}
SEEDS = (0, 1, 2)
MARK, END = "<!-- learning table -->", "<!-- /learning table -->"
LIMIT_S = 60.0  # of one algorithm's six runs


def row(variant: str, found: dict[str, list[Outcome]], seconds: float) -> str:
    cells = [variant]
    for outcomes in found.values():
        cells += [", ".join(f"{o.reward:.2f}" for o in outcomes), ", ".join(f"{o.kl:.2f}" for o in outcomes)]
    rl = recipe_of(variant, TASKS["rule"], 0, 1).rl
    assert rl is not None
    bounded = rl.trust.max_kl is not None
    moved = max(o.moved for outcomes in found.values() for o in outcomes)
    cells += [f"{moved:.4f}" if rl.update == "trust_region" else f"{moved:.2f}" if bounded else "one step"]
    return "| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |"


def main() -> None:
    torch.set_num_threads(1)
    head = (
        "| algorithm | bandit: reward | KL | rule: reward | KL | most moved | processor s |\n"
        "|---|---|---|---|---|---|---|"
    )
    lines, missed = [head], []
    print(head, flush=True)
    for variant in VARIANTS:
        start = time.process_time()  # one thread: its processor time, whatever else the machine does
        found = {name: [learn(variant, task, seed, STEPS[name]) for seed in SEEDS] for name, task in TASKS.items()}
        seconds = time.process_time() - start
        lines.append(row(variant, found, seconds))
        print(lines[-1], flush=True)
        for name, outcomes in found.items():
            for seed, outcome in zip(SEEDS, outcomes, strict=True):
                if not learned(variant, TASKS[name], outcome):
                    missed.append(f"{variant}, {name}, seed {seed}: reward {outcome.reward:.2f}")
                if not held(variant, outcome):
                    missed.append(f"{variant}, {name}, seed {seed}: KL {outcome.kl:.2f}, moved {outcome.moved:.3f}")
        if seconds > LIMIT_S:
            missed.append(f"{variant}: {seconds:.0f} s")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    made = f"{time.strftime('%Y-%m-%d')}, {processor()}, torch {torch.__version__}, Python {platform.python_version()}"
    lines.append(f"\n`make learning`, {made}, commit {commit}; max_kl {MAX_KL}.")
    for page in ("algorithms.md", "algorithms.zh.md"):
        write(DOCS / page, "\n".join(lines))
    print("\n".join(missed) or "every run learned its task and held its bound")
    sys.exit(bool(missed))


def write(page: Path, table: str) -> None:
    """Put the table between its marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARK)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{MARK}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
