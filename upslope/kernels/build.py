"""cpu.cpp and its headers, compiled once for this processor by the machine's own C++ compiler and kept in the user's
cache folder.

Where there is no compiler, or what it made does not run here, callers use torch's operations: slower, the same results
but for rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from upslope.sources import cache_folder

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.hpp"))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
WIDE = "-mprefer-vector-width=512"  # x86: whole registers where it has them
SECONDS = 120  # a compiler that takes longer hangs


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there can be none. They share torch's threads: torch is imported before."""
    compiler = shutil.which("g++") if sys.platform == "linux" else None
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # also: there is no home folder
        return None


def _compiled(compiler: str) -> Path:
    """The shared library, made if it is not there; named after all that it depends on."""
    flags = (*FLAGS, WIDE) if platform.machine() in ("x86_64", "AMD64") else FLAGS
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    text = [path.read_bytes() for path in (SOURCE, *HEADERS)]
    name = hashlib.sha256(b"\0".join([*text, version, _processor(), " ".join(flags).encode()])).hexdigest()
    folder = cache_folder() / "kernels"
    made = folder / f"{name[:24]}.so"
    if not made.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # beside its place, so that a rename puts it there whole
            built = Path(work) / made.name
            command = [compiler, *flags, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)
            built.replace(made)
    return made


def _processor() -> bytes:
    """What the processor can do: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith((b"flags", b"Features", b"model name", b"CPU part"))]
    return b"\n".join(sorted(set(told))) or platform.processor().encode()
