"""A GPU's minutes: parts that fail, hang or find no time left cost no other, and are named."""

import json
import sys
import time

from benchmarks.device import main, together
from benchmarks.runner import Session
from benchmarks.sizes import SMOKE


def run(monkeypatch, folder, *more):
    common = ["--size", "smoke", "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--work", str(folder / "work")]
    monkeypatch.setattr(sys, "argv", ["device", "--out", str(folder / "out"), *common, *more])
    assert main() == 0
    return json.loads((folder / "out" / "tiny.json").read_text())


def test_what_was_found_and_what_not_is_written(monkeypatch, tmp_path):
    result = run(monkeypatch, tmp_path, "--tasks", "packed", "--commit", "abc")
    assert [found["what"] for found in result["runs"]] == [
        "bandwidth",
        "decode-few",
        "decode-many",
        "packed",
        "gap",
        "profile-decode",
        "profile-training",
    ]
    assert all("table" not in found["details"] for found in result["runs"]) and result["not_measured"] == {}
    assert "profile-training\n" in (tmp_path / "out" / "profile.txt").read_text()
    assert result["size"] == "smoke" and result["commit"]


def test_nothing_is_begun_when_no_time_is_left(monkeypatch, tmp_path):
    begun = time.monotonic()
    result = run(monkeypatch, tmp_path, "--tasks", "packed", "--minutes", "0")
    assert result["runs"] == [] and time.monotonic() - begun < 60
    assert "no time was left" in result["not_measured"]["upslope packed"]


def test_a_process_at_its_limit_is_ended_with_what_it_started(tmp_path):
    session = Session(tmp_path / "tiny", SMOKE, None, "fp32", "cpu", 1, 1)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\n(sleep 3; echo late > {tmp_path}/late) & echo \'{{"what": "x"}}\'; wait\n')
    program.chmod(0o755)
    done = session.call(program, "module", ["name"], limit=0.5)
    assert done.status is None and done.stdout == '{"what": "x"}\n' and done.seconds < 2.5
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_tasks_with_peers_run_by_themselves():
    assert together(("bandwidth", "gap")) == [("bandwidth", "gap")]
    assert together(("generate", "logprobs")) == [("generate",), ("logprobs",)]
