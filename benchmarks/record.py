"""What a program says when it is done: one JSON line. Standard library only: the peers' interpreters read it too."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def peak_gb() -> float:
    """The most memory this process has held, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def versions(packages: Sequence[str]) -> dict[str, str]:
    """What is installed of the packages named, and this Python."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def line(
    what: str,
    by: str,
    value: float,
    unit: str,
    *,
    packages: Sequence[str],
    memory_gb: float | None = None,
    **details: Any,
) -> dict[str, Any]:
    """The record of one measurement; memory_gb: where it was not this process that did the work."""
    return {
        "what": what,
        "by": by,
        "value": value,
        "unit": unit,
        "peak_gb": round(peak_gb() if memory_gb is None else memory_gb, 4),
        "details": details,
        "versions": versions(packages),
    }


def read_line(text: str) -> dict[str, Any] | None:
    """The last record in a program's output, whatever else it printed; None where there is none."""
    found = read_lines(text)
    return found[-1] if found else None


def read_lines(text: str) -> list[dict[str, Any]]:
    """Every record in a program's output, in order."""
    return [json.loads(raw) for raw in text.splitlines() if raw.startswith('{"what"')]


def read_failures(text: str) -> dict[str, str]:
    """Name -> why, of what a program of several could not measure."""
    failed = [json.loads(raw) for raw in text.splitlines() if raw.startswith('{"failed"')]
    return {entry["failed"]: entry["why"] for entry in failed}
