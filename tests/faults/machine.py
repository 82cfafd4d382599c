"""Where figures come from, and their place in docs/reliability.md.

The Chinese page follows by hand: a test (tests/docs) compares the numbers of both.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.checkpoints import ROOT
from upslope.training.run import processor

REPORT = ROOT / "docs" / "reliability.md"
BY_HAND = "<!-- by hand -->"


def where_and_when() -> str:
    """Machine, date and commit, for behind a figure."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = f"commit {told.stdout.strip() or 'unknown'}{' and changes' if changed else ''}"
    name = processor().partition(",")[0]
    return f"{os.cpu_count()} cores of {name}, torch {torch.__version__}; {time.strftime('%Y-%m-%d')}; {commit}"


def section(title: str, path: Path = REPORT) -> list[str]:
    """The lines under the heading `## title`."""
    return path.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()


def replace_section(title: str, lines: Sequence[str], path: Path = REPORT) -> None:
    """Put lines under the heading `## title`, in the place of what stood there; a new one stands at the end.

    What was written by hand, below a line BY_HAND of the section, stays.
    """
    text = path.read_text(encoding="utf-8")
    head, heading, rest = text.partition(f"## {title}\n")
    if not heading:  # a new section, at the end
        head, heading = f"{text.rstrip()}\n\n", f"## {title}\n"
    before, following, tail = rest.partition("\n## ")
    _, mark, by_hand = before.partition(f"{BY_HAND}\n")
    made = "\n".join(lines) + "\n" + (f"\n{mark}{by_hand}" if mark else "")
    path.write_text(f"{head}{heading}\n{made}" + (following + tail if following else ""), "utf-8")
