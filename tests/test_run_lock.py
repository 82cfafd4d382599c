"""Small files replaced whole, and the lock of a run folder against a real second process."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import child, names
from upslope.checkpoint import RunLock, atomic_write_bytes, atomic_write_text
from upslope.errors import RunError


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300))
def test_atomic_write_replaces_whole(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("atomic")
    atomic_write_bytes(folder / "new" / "a.bin", b"longer than what follows it" * 20)
    atomic_write_bytes(folder / "new" / "a.bin", data)
    assert (folder / "new" / "a.bin").read_bytes() == data
    assert names(folder / "new") == ["a.bin"]


def test_atomic_write_text_is_utf8_without_newline_changes(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "é\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\n\n"


HOLDER = """
import sys
from pathlib import Path
from upslope.checkpoint import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


def test_second_process_is_refused_with_the_first_ones_number(tmp_path: Path) -> None:
    with child(HOLDER, tmp_path) as holder:
        assert holder.stdin and holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid}; wait"):
            RunLock(tmp_path)
        with pytest.raises(RunError, match=f"in use by process {holder.pid}; wait"):  # the refusal took nothing
            RunLock(tmp_path)
        RunLock(_made(tmp_path / "another")).release()
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "released\n"
        lock = RunLock(tmp_path)
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        lock.release()
        lock.release()
        holder.kill()


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with child(HOLDER, tmp_path) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
        assert (tmp_path / ".lock").read_text() == str(holder.pid)
        RunLock(tmp_path).release()


def test_lock_is_not_inherited_by_programs_that_the_run_starts(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with child("import sys; sys.stdin.readline()", close_fds=False) as worker:
        lock.release()
        RunLock(tmp_path).release()
        worker.kill()


def test_file_system_without_locks_is_not_called_a_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"cannot lock .*: No locks available"):
        RunLock(tmp_path)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
