"""Everything that a finished run has decided, without its times and its memory, to compare two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TIMES = ("time/", "memory/")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """One checksum over names, types, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def outcome(folder: Path) -> dict[str, Any]:
    """name -> what must be equal: weight files, closing states, events, episodes, and which files there are."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if name.startswith("tensorboard/") or name == ".lock":
            continue
        found[name] = "there"
        if path.suffix == ".safetensors" or path.name == "samples.jsonl":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "done.json":
            found[name] = _timeless(json.loads(path.read_bytes())["metrics"])
    for stage in ("pretrain", "sft", "reward", "preference", "rl", "expert"):
        noted = Path(f"{folder}.{stage}.state")
        if noted.exists():
            found[f"closing state of {stage}"] = json.loads(noted.read_bytes(), parse_constant=str)
    for number, line in enumerate((folder / "events.jsonl").read_bytes().splitlines()):
        event = json.loads(line)
        if event["kind"] == "checkpoint":  # when one is due is a matter of time
            continue
        found.setdefault("events", []).append(_event(event))
        assert line, number
    episodes = folder / "episodes.jsonl"
    found["episodes"] = episodes.read_bytes().splitlines() if episodes.exists() else []
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which things two outcomes differ, and for lists in which line first."""
    told = []
    for name in sorted(set(one) | set(other)):
        a, b = one.get(name), other.get(name)
        if a == b:
            continue
        if isinstance(a, list) and isinstance(b, list):
            first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            told.append(
                f"{name}: {len(a)} and {len(b)} lines, first other one {first}: {_at(a, first)} | {_at(b, first)}"
            )
        else:
            told.append(f"{name}: {str(a)[:200]} | {str(b)[:200]}")
    return told


def _at(lines: list[Any], number: int) -> str:
    return str(lines[number])[:300] if number < len(lines) else "nothing"


def _event(event: dict[str, Any]) -> dict[str, Any]:
    event.pop("seconds", None)
    event.pop("machine", None)
    event.get("recipe", {}).pop("checkpoint_minutes", None)  # may change between two starts
    if "metrics" in event:
        event["metrics"] = _timeless(event["metrics"])
    return event


def _timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith(TIMES)}
