"""What a user's code may do to its worker: none of it may reach the trainer, the disk or the next batch's scores."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from upslope.errors import RewardError
from upslope.rewards.functions import FunctionReward


def words(prompts, completions, rows):
    return [float(len(c.split())) for c in completions]


def alive(pid):
    """Whether a process still runs: a zombie that nobody has reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, seconds=5.0):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


@pytest.fixture
def open_reward():
    """Makers of rewards that are closed after the test, whatever happens in it."""
    made = []

    def make(source, **options):
        made.append(FunctionReward(source, name="mine", **options))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def ask(reward, completions):
    return reward([""] * len(completions), completions, [{}] * len(completions))


def test_c54_an_interrupted_batch_leaves_no_answer_for_the_next_one(open_reward):
    def slow(prompts, completions, rows):
        time.sleep(0.6)
        return [float(c) for c in completions]

    reward = open_reward(slow)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            ask(reward, ["1", "2"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ask(reward, ["7", "8"]).score_B.tolist() == [7.0, 8.0]


def test_c54_when_everything_hangs_the_batch_ends_soon(open_reward):
    def hang(prompts, completions, rows):
        time.sleep(60)

    reward = open_reward(hang, timeout_s=0.05, chunk=16)
    starts, start = [], reward.worker.start
    reward.worker.start = lambda: (starts.append(1), start())
    output = ask(reward, ["x"] * 64)
    assert np.isnan(output.score_B).all() and all(output.failure_B)
    assert "no answer within 0.05 s" in output.failure_B[0]
    assert "not tried" in output.failure_B[-1] and "no answer within 0.05 s" in output.failure_B[-1]
    assert len(starts) < 16


def test_c54_scores_of_ordinary_chunks_survive_the_hanging_of_one(open_reward):
    def hang(prompts, completions, rows):
        if "bad" in completions:
            time.sleep(60)
        return words(prompts, completions, rows)

    texts = ["one two"] * 40
    texts[3] = "bad"
    output = ask(open_reward(hang, timeout_s=0.3, chunk=8), texts)
    assert [i for i, f in enumerate(output.failure_B) if f] == [3]
    assert np.nansum(output.score_B) == 78.0


def test_exit_is_a_failure_of_its_row_only(open_reward):
    def leave(prompts, completions, rows):
        if "bad" in completions:
            sys.exit(4)
        return words(prompts, completions, rows)

    output = ask(open_reward(leave), ["a", "bad", "b c"])
    assert output.score_B[[0, 2]].tolist() == [1.0, 2.0]
    assert np.isnan(output.score_B[1]) and "4" in output.failure_B[1]


def test_numbers_of_every_kind_and_things_that_are_none(open_reward):
    def odd(prompts, completions, rows):
        from decimal import Decimal
        from fractions import Fraction

        class Odd:
            pass

        return [
            True,
            2,
            np.float32(0.5),
            np.array(3.0),
            Fraction(1, 4),
            Decimal("1.5"),
            10**400,
            1j,
            Odd(),
            b"1",
            [1.0],
        ]

    output = ask(open_reward(odd), [str(i) for i in range(11)])
    assert output.score_B[:6].tolist() == [1.0, 2.0, 0.5, 3.0, 0.25, 1.5]
    assert [f is not None for f in output.failure_B] == [False] * 6 + [True] * 5
    assert all("not a number" in f for f in output.failure_B[6:])


def test_what_the_worker_started_ends_with_it(open_reward, tmp_path):
    def grandchild(prompts, completions, rows):
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        child.wait()

    output = ask(open_reward(grandchild, timeout_s=0.5), ["a"])
    assert "no answer within 0.5 s" in output.failure_B[0]
    assert gone(int((tmp_path / "pid").read_text()))


TRAINER = """
import os, sys, time
from upslope.rewards.functions import FunctionReward
place = sys.argv[1]
def hang(prompts, completions, rows):
    with open(place, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
FunctionReward(hang, name="mine")([""], ["x"], [{}])
"""


def test_a_busy_worker_dies_with_a_killed_trainer(tmp_path):
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path / "pid")], cwd=os.getcwd())
    end = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        if time.monotonic() > end or trainer.poll() is not None:
            break
        time.sleep(0.02)
    trainer.kill()
    trainer.wait()
    worker = int((tmp_path / "pid").read_text())
    dead = gone(worker)
    if not dead:
        os.kill(worker, signal.SIGKILL)
    assert dead


def test_interrupts_of_the_terminal_do_not_reach_the_worker(open_reward):
    def who(prompts, completions, rows):
        os.kill(os.getpid(), signal.SIGINT)
        return [float(os.getsid(0))] * len(completions)

    reward = open_reward(who)
    assert ask(reward, ["a"]).score_B.tolist() == [float(reward.worker.process.pid)]


def test_talk_without_end_takes_no_disk(open_reward):
    def talk(prompts, completions, rows):
        sys.stdout.write("x" * 4_000_000)
        sys.stdout.flush()
        os.write(1, b"y" * 1_000_000)
        if "die" in completions:
            print("\nmy last words", flush=True)
            os._exit(1)
        return words(prompts, completions, rows)

    reward = open_reward(talk, chunk=1)
    output = ask(reward, ["a b"] * 5)
    assert output.score_B.tolist() == [2.0] * 5
    assert os.fstat(reward.worker.said.fileno()).st_size < 2_000_000
    assert "exit status 1, last words: my last words" in ask(reward, ["die"]).failure_B[0]


def test_a_worker_that_died_between_batches_is_replaced_and_leaks_nothing(open_reward):
    reward = open_reward(words)
    assert ask(reward, ["a b"]).score_B.tolist() == [2.0]
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        reward.worker.process.kill()
        reward.worker.process.wait()
        assert ask(reward, ["a b"]).score_B.tolist() == [2.0]
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_users_file_may_have_the_name_of_a_standard_module(open_reward, tmp_path):
    (tmp_path / "struct.py").write_text(
        "import sys\ndef score(p, c, r):\n    return [float(sys.modules['struct'].calcsize('<Q'))]\n"
    )
    assert ask(open_reward(f"{tmp_path}/struct.py:score"), ["a"]).score_B.tolist() == [8.0]


def test_modules_of_the_current_folder_and_callables_from_them(open_reward, tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text("def score(p, c, r):\n    return [5.0 for _ in c]\n")
    monkeypatch.chdir(tmp_path)
    assert ask(open_reward("mine_here:score"), ["x"]).score_B.tolist() == [5.0]
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    import mine_here

    assert ask(open_reward(mine_here.score), ["x"]).score_B.tolist() == [5.0]


def test_a_callable_that_cannot_travel_is_named():
    lock = __import__("threading").Lock()

    def holds(prompts, completions, rows):
        with lock:
            return [0.0]

    with pytest.raises(RewardError, match=r"reward mine cannot be sent to its worker.*lock"):
        FunctionReward(holds, name="mine")


def test_workers_start_light_with_one_thread(open_reward):
    def look(prompts, completions, rows):
        heavy = {"torch", "transformers", "datasets", "pandas"} & set(sys.modules)
        threads = [os.environ[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")]
        return [float(len(heavy)), *map(float, threads)]

    assert ask(open_reward(look), list("abcd")).score_B.tolist() == [0.0, 1.0, 1.0, 1.0]


def test_ten_thousand_rows(open_reward):
    texts = ["w " * (i % 7) for i in range(10_000)]
    output = ask(open_reward(words), texts)
    assert output.score_B.tolist() == [i % 7 for i in range(10_000)] and not any(output.failure_B)
