"""Saving where it cannot be done: killed processes, full disks, limits, refusals. What stood before still stands."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import child, names, newest, save
from upslope import checkpoint as module
from upslope.checkpoint import RunLock, atomic_write_text, save_checkpoint
from upslope.errors import RunError

FORKED = """
import json, os, sys, torch
from pathlib import Path
from upslope.checkpoint import load_checkpoint, save_checkpoint

EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.listdir", "shutil.rmtree"}

def save(folder, step):
    tensors = {"model": {"w": torch.full((3, 5), float(step))}, "optimizer": {}}
    save_checkpoint(folder, step, tensors=tensors, state={"step": step}, keep=1)

for kill_at in range(1, 200):
    folder = Path(sys.argv[1]) / str(kill_at)
    save(folder, 1)
    child = os.fork()
    if child == 0:
        left = [kill_at]
        def audit(event, arguments):
            if event in EVENTS:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), 9)
        sys.addaudithook(audit)
        save(folder, int(sys.argv[2]))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.tensors("model")["w"], torch.full((3, 5), float(loaded.state["step"])))
    save(folder, 3)   # whatever was left behind is no hindrance
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    print(json.dumps([-code, loaded.step]))
    if code == 0:
        break
"""


@pytest.mark.parametrize("step", [1, 2])
def test_c55_killed_before_any_file_operation_of_a_save(tmp_path: Path, step: int) -> None:
    """SIGKILL before each open, rename, mkdir and removal in turn: one whole checkpoint always stands."""
    process = child(FORKED, tmp_path, step)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    outcomes = [json.loads(line) for line in out.splitlines()]
    assert len(outcomes) > 10 and outcomes[-1] == [0, step]
    assert {tuple(outcome) for outcome in outcomes[:-1]} == {(signal.SIGKILL, 1), (signal.SIGKILL, step)}


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from upslope.checkpoint import atomic_write_text, save_checkpoint
from upslope.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = Path(sys.argv[1])
for write in (
    lambda: save_checkpoint(folder, 2, tensors={"model": {"w": torch.ones(100_000)}}, state={}),
    lambda: atomic_write_text(folder / "done.json", "x" * 200_000),
):
    try:
        write()
    except RunError as error:
        print(error)
"""


def test_c56_a_file_that_outgrows_its_limit_leaves_the_old_ones(tmp_path: Path) -> None:
    """A real EFBIG out of write(2), in a process of its own whose file size limit is 100 kB."""
    save(tmp_path, 1)
    atomic_write_text(tmp_path / "done.json", "old")
    process = child(FULL_DISK, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    first, second = out.splitlines()
    assert "step-00000002: File too large; free space" in first
    assert "done.json: File too large; free space" in second
    assert names(tmp_path) == ["done.json", "step-00000001"] and newest(tmp_path) == 1
    assert (tmp_path / "done.json").read_text() == "old"


def test_c56_a_full_disk_leaves_the_old_ones(tmp_path: Path) -> None:
    """A real ENOSPC, on a file system of 2 MB; the space check is passed by what it cannot know (block overhead)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs root and a kernel that lets it mount a tmpfs")
    try:
        save(disk, 1)
        many = {f"group{n}": {"w": torch.zeros(1)} for n in range(600)}  # 600 files of one 4 kB page each
        with pytest.raises(RunError, match="step-00000002: No space left on device"):
            save_checkpoint(disk, 2, tensors=many, state={})
        assert names(disk) == ["step-00000001"] and newest(disk) == 1
        save(disk, 2)
        assert newest(disk) == 2
    finally:
        subprocess.run(["umount", disk], check=True)


def test_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(module, "_write", lambda *arguments: pytest.fail("written without space"))
    with pytest.raises(RunError, match="1408002 bytes needed, 1000100 bytes free; free space"):
        save_checkpoint(tmp_path, 2, tensors={"model": {"w": torch.ones(100_000)}}, state={})
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_c56_a_sync_that_fails_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Late errors come out of fsync (quotas, network disks); only a substitute can make one here."""
    save(tmp_path, 1)
    calls = []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=os.strerror(number)):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"] and newest(tmp_path) == 1


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "checkpoints"
    with pytest.raises(RunError, match="checkpoints: Not a directory"):
        save(below, 1)
    with pytest.raises(RunError, match=r"done.json: (Not a directory|File exists)"):
        atomic_write_text(below / "done.json", "x")
    with pytest.raises(RunError, match="Not a directory"):
        RunLock(below)

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(tmp_path / "good", 1)
    monkeypatch.setattr(Path, "mkdir", refuse)  # root, as which tests often run, is never refused by permission bits
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RunError, match="step-00000002: Permission denied"):
        save(tmp_path / "good", 2)
    with pytest.raises(RunError, match=r"done\.json: Permission denied"):
        atomic_write_text(tmp_path / "done.json", "x")
    monkeypatch.undo()
    assert names(tmp_path / "good") == ["step-00000001"] and newest(tmp_path / "good") == 1


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 2, tensors={}, state={"path": Path()})
    with pytest.raises(KeyError, match="complex64"):
        save_checkpoint(tmp_path, 2, tensors={"model": {"w": torch.ones(2, dtype=torch.complex64)}}, state={})
    assert names(tmp_path) == ["step-00000001"]
