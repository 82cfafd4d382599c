"""Checkpoints that can be trusted: written beside, synced, renamed, with checksums; safetensors and JSON only.

    FOLDER/step-00000012/{model.safetensors, ..., state.json, manifest.json}
    FOLDER/partial-00000013/     being written, or what a killed process left: never read, removed by the next save
    FOLDER/replaced-00000012/    for an instant, while step 12 is saved again: read where no good step 12 stands
    FOLDER/damaged-step-00000014/   what a resumed run could not verify and went past: kept for a person to look at

A damaged checkpoint is named and the one before it used. The newest two are kept, and those that these call the best.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from upslope.errors import RunError
from upslope.version import VERSION

FORMAT = 1
CHUNK = 1 << 22
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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
    """Write one checkpoint whole or not at all, then remove all but the newest `keep` >= 1 and their best ones.

    state["best"], where it is there, is the step of an older checkpoint that is needed as long as this one is.
    Checkpoints of later steps must be damaged ones, which a resumed run went past: they are renamed, so that what is
    saved last is what is loaded next. Raises RunError when a later one is good, and when the disk is full or refuses:
    what was there before stays as it was.
    """
    final, partial = folder / f"step-{step:08d}", folder / f"partial-{step:08d}"
    state_json = json.dumps(state).encode()
    later = [path for path in _entries(folder) if _step(path) > step]
    for path in later:
        if _problem(path) is None:
            raise RunError(f"{folder} holds {path.name}, later than step {step} that is to be saved", f"remove {path}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("partial-*"):
            shutil.rmtree(stale)
        _need_space(folder, len(state_json) + sum(t.nbytes for group in tensors.values() for t in group.values()))
        partial.mkdir()
        files = {f"{name}.safetensors": _safetensors(group) for name, group in tensors.items()}
        seals = {name: _write(partial / name, parts) for name, parts in files.items()}
        seals["state.json"] = _write(partial / "state.json", [state_json])
        manifest = {"format": FORMAT, "upslope": VERSION, "step": step, "files": seals}
        _write(partial / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        _sync(partial)
        _take_place(partial, final)
        for path in later:
            path.rename(_cleared(path.with_name(f"damaged-{path.name}")))
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"cannot write the checkpoint {final}: {reason}", "free space or mend the folder; older ones stand"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    entries = _entries(folder)
    needed = {_best(path) for path in entries[-max(keep, 1) :]}
    for path in entries[: -max(keep, 1)]:
        if _step(path) not in needed:
            shutil.rmtree(path, ignore_errors=True)
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold, or None where there is none at all.

    Raises RunError when there are checkpoints and every one is damaged: starting anew must be asked for.
    """
    skipped: list[str] = []
    for path in reversed(_entries(folder)):
        problem = _problem(path)
        if problem is None:
            return _read(path, skipped)
        skipped.append(f"{path}: {problem}")
    if skipped:
        raise RunError(f"every checkpoint is damaged: {'; '.join(skipped)}", f"remove {folder} to start the stage anew")
    return None


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    """The verified checkpoint of one step. Raises RunError where it is damaged or missing."""
    path = folder / f"step-{step:08d}"
    problem = _problem(path) if path.is_dir() else "is missing"
    if problem is not None:
        raise RunError(f"{path}: {problem}", "an older checkpoint may be good")
    return _read(path, [])


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace a small file whole or not at all. Raises RunError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(partial, [data])
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"cannot write {path}: {reason}", "free space or mend its permissions") from error


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a small UTF-8 file whole or not at all. Raises RunError."""
    atomic_write_bytes(path, text.encode())


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
        except OSError as error:
            self.file.seek(0)
            holder = self.file.read().strip() or "unknown"
            self.file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks, for one
                raise RunError(f"cannot lock {folder}: {error.strerror}", "choose another folder with -o") from None
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


def _read(path: Path, skipped: list[str]) -> Checkpoint:
    state = json.loads((path / "state.json").read_bytes())
    files = json.loads((path / "manifest.json").read_bytes())["files"]
    groups = [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]
    return Checkpoint(path, _step(path), state, groups, skipped)


def _best(path: Path) -> int | None:
    """The step that a checkpoint calls the best; none where it does not, or cannot be read."""
    try:
        best = json.loads((path / "state.json").read_bytes()).get("best")
    except (OSError, ValueError, AttributeError):
        return None
    return best if isinstance(best, int) else None


def _need_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = int(needed * 1.02) + 1_000_000  # headers, manifest, and the logs that grow meanwhile
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes needed, {free} bytes free")


def _take_place(partial: Path, final: Path) -> None:
    """Give a finished folder its name; an older one of that name stays readable until the new one has it."""
    replaced = final.with_name(final.name.replace("step", "replaced"))
    if final.exists():
        final.rename(_cleared(replaced))
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _cleared(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def _safetensors(group: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in parts: 8 bytes of header length, header, then each tensor's bytes, widest first (aligned).

    Written here and not by the library, so that a checksum needs no second read and one tensor at a time is copied.
    https://huggingface.co/docs/safetensors/index#format
    """
    ordered = sorted(group.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync a file; its size and checksum are taken on the way."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                chunk = part[start : start + CHUNK]
                digest.update(chunk)
                size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _entries(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; of one step, what was replaced comes before what replaced it."""
    try:
        found = [p for p in folder.iterdir() if re.fullmatch(r"(step|replaced)-\d+", p.name) and p.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror}", "mend the folder, or choose another") from error
    return sorted(found, key=lambda path: (_step(path), path.name))


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        if manifest["step"] != _step(path) or "state.json" not in manifest["files"]:
            return "manifest.json is not that of this checkpoint"
        for name, seal in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != seal["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {seal['bytes']}"
            if _sha256(file) != seal["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json does not verify it: {error}"
    return None
