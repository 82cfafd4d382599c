"""Where the kernels come from, and what happens where they cannot be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from upslope.kernels import build


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "upslope" / "kernels"
    build.library.cache_clear()


def a_compiler(folder: Path, script: str) -> str:
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.library() is None


@pytest.mark.parametrize(
    "script", ["exit 1", "echo broken > /dev/null", 'echo no library > "$(echo $* | sed s/.*-o.//)"']
)
def test_a_compiler_that_fails(script: str, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = a_compiler(tmp_path, script)
    monkeypatch.setattr(build.shutil, "which", lambda name: fake)
    assert build.library() is None
    assert not list(empty_cache.glob("*.so")) or "no library" in script


@pytest.mark.skipif(build.shutil.which("g++") is None, reason="no C++ compiler here")
def test_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library() is not None
    made = list(empty_cache.iterdir())
    assert [p.suffix for p in made] == [".so"]  # no work is left lying about
    build.library.cache_clear()
    written = made[0].stat().st_mtime_ns
    assert build.library() is not None and made[0].stat().st_mtime_ns == written


@pytest.mark.skipif(build.shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.library() is None
