"""What the tests of checkpoints and locks share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from upslope.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def save(folder: Path, step: int, best: int | None = None, **options: Any) -> Path:
    tensors = {"model": {"w": torch.full((3, 5), float(step)), "b": torch.tensor(step)}, "optimizer": {}}
    state = {"step": step, "note": "é"} | ({} if best is None else {"best": best})
    return save_checkpoint(folder, step, tensors=tensors, state=state, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> int:
    """The step that is loaded, after a check that its contents are those of that step."""
    loaded = load_checkpoint(folder)
    assert loaded is not None
    assert {**loaded.state, "best": 0} == {"step": loaded.step, "note": "é", "best": 0}
    assert torch.equal(loaded.tensors("model")["w"], torch.full((3, 5), float(loaded.step)))
    return loaded.step


def child(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)
