"""A worker that takes too much memory, or lies: it costs its rows, and nothing of it runs in the trainer."""

import os
import pickle
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.rewards.test_workers import alive, ask, open_reward, words
from upslope.errors import Interrupted
from upslope.rewards import tree

assert open_reward  # a fixture

MB = 1_000_000


def test_a_row_that_takes_too_much_memory_fails_alone(open_reward):
    def greedy(prompts, completions, rows):
        if "bad" in completions:
            bytearray(900 * MB)
        return words(prompts, completions, rows)

    reward = open_reward(greedy, memory_gb=0.5)
    output = ask(reward, ["a b", "bad", "c"])
    assert output.score_B[[0, 2]].tolist() == [2.0, 1.0]
    assert np.isnan(output.score_B[1]) and output.failure_B[0] is None and output.failure_B[2] is None
    assert "needs more than limits.memory_gb = 0.5: MemoryError" in output.failure_B[1]


def test_a_leak_from_call_to_call_costs_no_row(open_reward):
    """80 MB kept at each call under a limit of 300 MB: a tenth call would never come without a new process."""

    def leaky(prompts, completions, rows):
        leaky.kept = [*getattr(leaky, "kept", []), np.ones(10 * MB)]
        return [float(os.getpid())] * len(completions)

    reward = open_reward(leaky, memory_gb=0.3, chunk=1)
    output = ask(reward, ["x"] * 10)
    assert output.failure_B == [None] * 10
    assert 1 < len(set(output.score_B)) < 10
    assert not alive(int(output.score_B[0]))


def test_a_leak_within_one_call_ends_with_its_process(open_reward):
    def endless(prompts, completions, rows):
        kept = []
        while True:
            kept.append(bytearray(10 * MB))

    reward = open_reward(endless, memory_gb=0.3)
    started = time.monotonic()
    output = ask(reward, ["x"] * 3)
    assert all("needs more than limits.memory_gb = 0.3" in failure for failure in output.failure_B)
    assert time.monotonic() - started < 10
    assert reward.worker.process is None


def test_a_program_that_the_reward_starts_is_under_the_limit_too(open_reward):
    def starts(prompts, completions, rows):
        import subprocess

        done = subprocess.run([sys.executable, "-c", "bytearray(900_000_000)"], capture_output=True, text=True)
        assert "MemoryError" in done.stderr
        return [1.0] * len(completions)

    assert ask(open_reward(starts, memory_gb=0.5), ["x"]).score_B.tolist() == [1.0]


@pytest.mark.parametrize("apart", [False, True], ids=["forked", "in sessions of their own"])
def test_many_processes_are_under_the_limit_together(open_reward, apart):
    """Six processes of 100 MB each under 300 MB: none is too large alone, and the row with them fails."""

    def forks(prompts, completions, rows):
        if "bad" in completions:
            for _ in range(6):
                if os.fork() == 0:
                    if apart:
                        os.setsid()
                        if os.fork():
                            os._exit(0)
                    kept = b"x" * (100 * MB)
                    time.sleep(60)
                    os._exit(len(kept))
            time.sleep(60)
        return [float(os.getpid())] * len(completions)

    reward = open_reward(forks, memory_gb=0.3, timeout_s=30)
    assert ask(reward, ["good"]).failure_B == [None]
    leader = reward.worker.process.pid
    started = time.monotonic()
    output = ask(reward, ["a", "bad", "b"])
    assert time.monotonic() - started < 20
    assert [failure is None for failure in output.failure_B] == [True, False, True]
    assert "needs more than limits.memory_gb = 0.3: its processes held 0." in output.failure_B[1]
    assert tree.members(leader) == []


def test_what_many_processes_share_counts_once(open_reward):
    """Five forks that only read the 150 MB of their parent hold 150 MB together, not 900."""

    def shares(prompts, completions, rows):
        kept = b"x" * (150 * MB)
        children = [os.fork() for _ in range(5)]
        if 0 in children:
            sum(kept[:: 1 << 12])
            time.sleep(1)
            os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        return [1.0] * len(completions)

    assert ask(open_reward(shares, memory_gb=0.5), ["x"]).score_B.tolist() == [1.0]


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self):
        return (Path.touch, (Path(self.place),))


FORGERIES = [
    b"\xff" * 64,  # an answer of 2^64 bytes
    struct.pack("<Q", 4) + b"null",
    struct.pack("<Q", 9) + b'["odd",1]',
    struct.pack("<Q", 12) + b'["scores",3]',
    struct.pack("<Q", 17) + b'["scores",[null]]',
    struct.pack("<Q", 9) + b"\x80\x04\x95\xff\xfe\x00\x00\x01\x02",
    struct.pack("<Q", 30_000) + b"[" * 30_000,
]


@pytest.mark.parametrize("forged", FORGERIES, ids=range(len(FORGERIES)))
def test_an_answer_that_the_function_forges_costs_its_rows_only(open_reward, forged):
    def forger(prompts, completions, rows):
        if "bad" in completions:
            os.write(int(sys.argv[2]), forged)
            time.sleep(60)
        return words(prompts, completions, rows)

    output = ask(open_reward(forger, timeout_s=20), ["a b", "bad", "c"])
    assert output.score_B[[0, 2]].tolist() == [2.0, 1.0]
    assert output.failure_B[1] == "its answer was garbage"


def test_nothing_that_a_worker_says_runs_in_the_trainer(open_reward, tmp_path):
    body = pickle.dumps(Trap(str(tmp_path / "ran")))

    def forger(prompts, completions, rows):
        os.write(int(sys.argv[2]), struct.pack("<Q", len(body)) + body)
        time.sleep(60)

    assert ask(open_reward(forger, timeout_s=20), ["x"]).failure_B == ["its answer was garbage"]
    assert not (tmp_path / "ran").exists()
    pickle.loads(body)
    assert (tmp_path / "ran").exists()  # the trap works


def test_a_stop_does_not_wait_for_a_hanging_reward(open_reward):
    def hang(prompts, completions, rows):
        time.sleep(60)

    asked = time.monotonic() + 0.5
    reward = open_reward(hang, should_stop=lambda: time.monotonic() > asked)
    with pytest.raises(Interrupted, match="stopped while reward mine was asked"):
        ask(reward, ["x"])
    assert time.monotonic() - asked < 2
    assert reward.worker.process is None
