"""A process with all that it has started, read from /proc: what they hold together, and their end.

A process belongs to the tree of a leader if it is in its session or descends from it. A leader that takes in orphans
(`adopt_orphans`) keeps those, too, that went into a session of their own and whose parent ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
ROUNDS = 20  # a process may start another while it is looked for


def adopt_orphans() -> None:
    """Let orphans of this process's descendants become its children (Linux; elsewhere nothing changes)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (AttributeError, OSError):
        pass


def members(leader: int) -> list[int]:
    """The processes of the leader's tree, itself included; empty where there is no /proc."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = place.read_text(errors="replace").rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it has ended
            continue
        if state not in "ZX":
            number = int(place.parent.name)
            parents[number] = int(parent)
            if session == str(leader) or number == leader:
                found.add(number)
    while more := {number for number, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def memory(leader: int, limit: int) -> int:
    """Bytes of memory of their own that the processes of a tree hold together: exact only above `limit`.

    A page that several of them share counts once. The quick sum, in which it counts once for each, is looked at first.
    """
    tree = members(leader)
    quick = sum(_kilobytes(number, "status", ("RssAnon:", "RssShmem:")) for number in tree)
    if 1024 * quick <= limit:
        return 1024 * quick
    return 1024 * sum(_kilobytes(number, "smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")) for number in tree)


def end(leader: int) -> None:
    """SIGKILL for the whole tree."""
    for _ in range(ROUNDS):
        tree = [number for number in members(leader) if number != os.getpid()]
        for number in tree:
            try:
                os.kill(number, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        if not tree:
            return


def _kilobytes(number: int, file: str, names: tuple[str, ...]) -> int:
    try:
        lines = Path(f"/proc/{number}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(names))
