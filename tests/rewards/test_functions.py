import math
import os
import time

import numpy as np
import pytest

from upslope.errors import RewardError
from upslope.rewards.functions import FunctionReward
from upslope.rewards.metrics import distinct_n, distinct_words, length_words, vader


def troublesome(prompts, completions, rows):
    """A reward with every fault that a user's can have, each on the completion of its name."""
    print("chatter " * 1000, flush=True)
    if "die" in completions:
        os._exit(3)
    if "raise" in completions:
        raise ValueError("no good")
    if "hang" in completions:
        time.sleep(60)
    odd = {"none": None, "nan": float("nan"), "inf": math.inf, "text": "1.0"}
    return [odd.get(c, len(c)) for c in completions]


def score(function, completions, **options):
    reward = FunctionReward(function, name="mine", **options)
    try:
        return reward(["p"] * len(completions), completions, [{}] * len(completions))
    finally:
        reward.close()


def test_c54_failures_are_a_state_of_their_own_and_never_a_zero():
    completions = ["ok", "die", "none", "raise", "fine", "hang", "nan", "inf", "text", "last"]
    output = score(troublesome, completions, timeout_s=1.0)
    good = [c in ("ok", "fine", "last") for c in completions]
    assert [f is None for f in output.failure_B] == good
    assert output.score_B[good].tolist() == [2.0, 4.0, 4.0]
    assert np.isnan(output.score_B[[not g for g in good]]).all()
    reasons = dict(zip(completions, output.failure_B, strict=True))
    assert "exit status 3" in reasons["die"] and "no answer within 1 s" in reasons["hang"]
    assert reasons["raise"].startswith("ValueError: no good") and "line" in reasons["raise"]
    assert reasons["none"] == "returned None, not a number" and reasons["nan"] == "returned nan"


def test_a_function_that_always_hangs_is_not_waited_for_row_by_row():
    begin = time.monotonic()
    output = score(troublesome, ["hang"] * 64, timeout_s=0.3)
    assert time.monotonic() - begin < 40  # each hang costs a new worker: on a busy machine one takes over a second
    assert all(output.failure_B) and any("not tried after 16 hangs" in f for f in output.failure_B)


def test_a_wrong_number_of_scores_is_nobodys_row():
    with pytest.raises(RewardError, match="mine returned 1 scores for 3 completions; return one number for each"):
        score(lambda p, c, r: [1.0], ["a", "b", "c"])


def test_a_reward_that_returns_no_list_fails_with_the_type():
    assert "must return a list of scores, got float" in score(lambda p, c, r: 1.0, ["a"]).failure_B[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("upslope.rewards.metrics:vadre", "has no function 'vadre'; it has .*vader"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("just_a_name", "is not module:function"),
    ],
)
def test_functions_that_cannot_be_loaded(source, message):
    with pytest.raises(RewardError, match=message):
        FunctionReward(source, name="mine")


def test_a_file_of_the_users_with_its_neighbours(tmp_path):
    (tmp_path / "helper.py").write_text("def double(x): return 2 * x\n")
    (tmp_path / "mine.py").write_text(
        "from helper import double\ndef score(prompts, completions, rows):\n"
        "    return [double(len(c)) + r['bonus'] for c, r in zip(completions, rows)]\n"
    )
    reward = FunctionReward(f"{tmp_path}/mine.py:score", name="score")
    assert reward(["p"], ["abc"], [{"bonus": 10}]).score_B.tolist() == [16.0]
    reward.close()
    (tmp_path / "mine.py").write_text("def score(:\n")
    with pytest.raises(RewardError, match="SyntaxError"):
        FunctionReward(f"{tmp_path}/mine.py:score", name="score")


def test_the_order_holds_over_chunks_and_arrays_are_read():
    output = score(lambda p, c, r: np.array([float(x) for x in c]), [str(i) for i in range(200)], chunk=7)
    assert output.score_B.tolist() == list(range(200))


def test_the_worker_ends_with_its_owner():
    reward = FunctionReward("upslope.rewards.metrics:vader", name="v")
    process = reward.worker.process
    reward.worker.requests.close()  # what the end of the trainer's process does
    assert process.wait(timeout=10) == 0
    reward.close()
    reward.close()


def test_metrics_by_hand():
    assert vader([], ["a great film", "an awful film"], [])[0] > 0.5 > 0 > vader([], ["an awful film"], [])[0]
    assert length_words([], ["two words", ""], []) == [2.0, 0.0]
    assert distinct_words([], ["a a b"], []) == [pytest.approx(2 / 3)]
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert distinct_n([], 1) == 0.0


def stepwise(prompts, completions, rows):
    return {
        "good": [[(3, 1.0), (5, -0.5)]],
        "empty": [[]],
        "nan": [[(3, float("nan"))]],
        "zero": [[(0, 1.0)]],
        "text": [[("x", 1.0)]],
    }[completions[0]]


def test_a_score_may_be_a_list_of_steps():
    reward = FunctionReward(stepwise, name="stepwise")
    try:
        output = reward(["p"], ["good"], [{}])
        assert output.score_B.tolist() == [0.5] and output.step_B == {0: [(3, 1.0), (5, -0.5)]}
        for bad in ("empty", "nan", "zero", "text"):
            output = reward(["p"], [bad], [{}])
            assert np.isnan(output.score_B).all() and output.failure_B[0] and not output.step_B, bad
    finally:
        reward.close()
