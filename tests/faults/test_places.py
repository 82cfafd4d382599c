"""Runs whose disk is full, or whose files may not be written: one line, nothing good is lost, and they carry on.

Small file systems are mounted for it, which needs root; elsewhere test_checkpoint_disk.py and injected faults stand.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.checkpoints import ROOT
from tests.faults.harness import Strike
from tests.faults.outcome import differences, outcome
from upslope.checkpoint import load_checkpoint

STAGES = ("sft", "reward", "rl")


@pytest.fixture
def mount(tmp_path):
    """mount(name, options): a small file system in memory at a new folder; mounted anew where it stands already."""
    mounted = []

    def start(name, options):
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        again = ["-o", f"remount,{options}"] if place in mounted else ["-t", "tmpfs", "-o", options]
        done = subprocess.run(["mount", *again, "tmpfs", place], capture_output=True, text=True)
        if done.returncode and place not in mounted:
            pytest.skip("needs root and a kernel that lets it mount a tmpfs")
        assert done.returncode == 0, done.stderr
        mounted.append(place)
        return place

    yield start
    for place in set(mounted):
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_in_a_run_loses_no_good_checkpoint(harness, mount):
    """The disk grows by some pages from start to start: each fills it at another place, the last one ends.

    checkpoint_minutes = 0 saves after every step and removes all but two: never the only good one.
    """
    codes, kept = [], 0
    for pages in range(272, 2000, 8):
        folder = mount("run", f"size={4 * pages}k")
        before = {stage: newest(folder / stage) for stage in STAGES}
        ended = harness.start("ppo-shared", folder, minutes=0)
        codes.append(ended.code)
        assert "Traceback" not in ended.said
        if ended.code == 0:
            break
        assert ended.code == 2 and len(ended.said.strip().splitlines()[-1]) < 400
        for stage, step in before.items():
            now = newest(folder / stage)  # raises where every checkpoint is damaged
            kept += now is not None
            assert (folder / stage / "done.json").is_file() or (now or 0) >= (step or 0)
    assert codes[-1] == 0 and codes.count(2) > 5 and kept > 3, codes
    assert harness.trial("ppo-shared", folder, []) == []


def newest(folder):
    found = load_checkpoint(folder / "checkpoints")
    return None if found is None else found.step


def test_a_run_folder_that_may_not_be_written_is_refused(harness, mount):
    folder = mount("run", "size=1m,ro")
    ended = harness.start("pretrain", folder)
    assert ended.code == 2 and f"cannot write in {folder}: Read-only file system; choose another" in ended.said
    assert len(ended.said.splitlines()) == 1


def test_what_a_run_reads_may_lie_where_nothing_can_be_written(recipe, rows, mount, tmp_path):
    """Rows, the model and the reward of a whole run, on a read-only file system: the real command leaves them alone."""
    place = mount("given", "size=8m")
    shutil.copytree(recipe["model"], place / "model")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "reward.py").write_text(
        "def score(prompts, completions, rows):\n    return [1.0 * len(c) for c in completions]"
    )
    mount("given", "ro")
    recipe["model"], recipe["data"]["rows"] = str(place / "model"), str(place / "rows.jsonl")
    recipe["rl"]["reward"] = f"{place}/reward.py:score"
    recipe["rl"]["steps"] = 1
    del recipe["reward"]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    code = "import json, sys, upslope; upslope.train(json.load(open(sys.argv[1])), out=sys.argv[2], plain=True)"
    command = [sys.executable, "-c", code, tmp_path / "recipe.json", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "eval" / "done.json").is_file()


def test_ten_thousand_bad_lines_are_one_short_line_at_once(harness, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + '{"text": \n' * 10_000 + '{"text": "good"}\n')
    toml = (harness.work / "pretrain.toml").read_text().replace(str(harness.work / "rows.jsonl"), str(path))
    (harness.work / "bad-lines.toml").write_text(toml)
    ended = harness.start("bad-lines", tmp_path / "run")
    assert ended.code == 2 and ended.seconds < 10
    assert "rows.jsonl, line 2 is not JSON" in ended.said and "(and 9999 more lines: 3, 4, 5, 6, 7, ...)" in ended.said
    assert len(ended.said) < 1000, ended.said


def test_two_runs_begun_at_once_in_one_folder(harness, tmp_path):
    """Two real processes: one of them trains, the other is refused, and what comes of it is an unbroken run's."""
    command = [
        sys.executable,
        "-c",
        "from upslope.cli import main; main()",
        "train",
        str(harness.work / "pretrain.toml"),
    ]
    command += ["-o", str(tmp_path / "run"), "--plain", "-s", "checkpoint_minutes=0.0"]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    codes = [process.returncode for process in both]
    refused = [text for code, text in zip(codes, said, strict=True) if code == 2]
    assert sorted(codes) in ([0, 2], [0, 0]), said  # [0, 0]: one had ended before the other began
    assert all("is in use by process" in text for text in refused)
    assert codes == [0, 0] or len(refused) == 1
    expected = harness.reference("pretrain")[0]
    noted = {name for name in expected if name.startswith("closing state")}  # by the harness, in its own processes
    assert differences(outcome(tmp_path / "run"), {k: v for k, v in expected.items() if k not in noted}) == []


def test_a_clock_that_is_set_back_by_hours_between_two_starts(harness, tmp_path):
    """Nothing that decides is read from the clock on the wall: files that are newer than now are as good as others."""
    folder = tmp_path / "run"
    count = harness.reference("pretrain")[1]["update"]
    harness.start("pretrain", folder, Strike("update", count // 2, "sigkill"))
    later = time.time() + 86_400
    for path in folder.rglob("*"):
        os.utime(path, (later, later))
    assert harness.trial("pretrain", folder, []) == []
