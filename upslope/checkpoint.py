"""Checkpoints that can be trusted: written beside, synced, renamed, with checksums; safetensors and JSON only.

    FOLDER/step-00000012/{model.safetensors, ..., state.json, manifest.json}

A folder with another name is unfinished and is never read. A damaged checkpoint is named and the one before it used.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upslope.errors import RunError

FORMAT = 1
HASH_CHUNK = 1 << 22


@dataclass
class Checkpoint:
    """A verified checkpoint; tensors are read when asked for. skipped names newer ones that were damaged."""

    path: Path
    step: int
    state: dict[str, Any]
    groups: list[str]
    skipped: list[str] = field(default_factory=list)

    def has(self, group: str) -> bool:
        return group in self.groups

    def tensors(self, group: str) -> dict[str, Tensor]:
        return load_file(self.path / f"{group}.safetensors")


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write one checkpoint whole or not at all, then remove all but the newest `keep`.

    Raises RunError when the disk is full or refuses; what was there before stays as it was.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"partial-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _need_space(folder, sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()))
        partial.mkdir()
        files = {}
        for name, group in tensors.items():
            path = partial / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous().cpu() for key, tensor in group.items()}, path)
            files[path.name] = _seal(path)
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files["state.json"] = _seal(partial / "state.json")
        manifest = {"format": FORMAT, "step": step, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(partial / "manifest.json")
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(
            f"cannot write the checkpoint {final}: {reason}", "free space or mend the folder; older ones stand"
        ) from error
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob("partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold, or None where there is none at all.

    Raises RunError when there are checkpoints and every one is damaged: starting anew must be asked for.
    """
    skipped: list[str] = []
    for path in reversed(_steps(folder)):
        problem = _problem(path)
        if problem is None:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            groups = [file.stem for file in path.glob("*.safetensors")]
            return Checkpoint(path, int(path.name.removeprefix("step-")), state, groups, skipped)
        skipped.append(f"{path}: {problem}")
    if skipped:
        raise RunError(f"every checkpoint is damaged: {'; '.join(skipped)}", f"remove {folder} to start the stage anew")
    return None


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a small file whole or not at all. Raises RunError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}", "free space or mend its permissions") from error


class RunLock:
    """One run at a time in a folder; the lock ends with the process that holds it. Raises RunError when it is held."""

    def __init__(self, folder: Path) -> None:
        path = folder / ".lock"
        try:
            self.file: IO[str] | None = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write in {folder}: {error.strerror}", "choose another folder with -o") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            holder = self.file.read().strip() or "unknown"
            self.file.close()
            raise RunError(
                f"{folder} is in use by process {holder}", "wait for it, or choose another folder with -o"
            ) from None
        self.file.seek(0)
        self.file.truncate()
        self.file.write(str(os.getpid()))
        self.file.flush()

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _need_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + 1_000_000:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def _seal(path: Path) -> dict[str, Any]:
    """Sync a file and return its size and checksum."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        for name, seal in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != seal["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {seal['bytes']}"
            if _sha256(file) != seal["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None
