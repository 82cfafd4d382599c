import math

import numpy as np
import pytest

from upslope.evaluate import Estimate, Outcome, estimate, estimates, interval, table_rows, without_score


def outcome(scores, nll=None, tokens=None):
    n = len(scores)
    return Outcome(
        completions=[f"w{i} a a" for i in range(n)],
        scores={"judge: x": np.array(scores, dtype=float)},
        base_nll_P=np.array(nll or [2.0] * n),
        tokens_P=np.array(tokens or [2.0] * n),
        kl_P=np.linspace(0, 1, n),
        ended_P=np.array([1.0, 0.0] * (n // 2)),
    )


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        _, low, high = interval(draw.normal(1.0, 2.0, size=60), seed=trial, draws=400)
        hits += low <= 1.0 <= high
    assert 180 <= hits <= 199


def test_statistics_by_hand_and_the_change_is_paired():
    before = outcome([0.0, 1.0, 2.0, 3.0], nll=[2.0, 4.0, 0.0, 2.0], tokens=[1.0, 1.0, 1.0, 1.0])
    after = outcome([1.0, 2.0, 3.0, 4.0])
    found = estimates([before, after], seed=0)
    judge = found["judge: x"]
    assert [e.value for e in judge] == [1.5, 2.5, 1.0]
    assert (judge[2].low, judge[2].high) == (1.0, 1.0)  # every pair rose by 1: the change has no spread
    assert judge[0].low < 1.5 < judge[0].high
    assert found["perplexity, original model"][0].value == pytest.approx(math.exp(2.0))
    assert found["ended by itself"][0].value == 0.5
    assert found["distinct-1"][0].value == pytest.approx(5 / 12)
    assert table_rows([before, after], found)[0][1] == judge[0].text(2)


def test_c54_failed_scores_are_in_no_mean():
    found = estimates([outcome([1.0, float("nan"), 3.0, float("nan")])], seed=0)
    assert found["judge: x"][0].value == 2.0
    assert math.isnan(estimates([outcome([float("nan")] * 4)], seed=0)["judge: x"][0].value)


def test_c54_both_means_and_the_change_are_over_prompts_that_failed_in_neither():
    nan = float("nan")
    both = [outcome([1.0, 100.0, 3.0, nan]), outcome([2.0, nan, 5.0, 50.0])]
    found = estimates(both, seed=0)["judge: x"]
    assert [e.value for e in found] == [2.0, 3.5, 1.5]
    assert without_score(both) == "; failed, and in no mean: 2 of judge: x"
    assert without_score([outcome([1.0] * 4)] * 2) == ""
    assert math.isnan(both[0].scores["judge: x"][3]) and both[0].scores["judge: x"][1] == 100.0  # nothing is changed


def test_an_end_that_is_not_nothing_is_not_shown_as_nothing():
    assert Estimate(-0.0081, -0.0145, -0.0021).text(2) == "-0.008 [-0.015, -0.002]"
    assert Estimate(0.02, 0.0, 0.05).text(2, signed=True) == "+0.02 [+0.00, +0.05]"  # this end is 0
    assert Estimate(-1e-9, -1e-8, 1e-8).text(2) == "0.000 [0.000, 0.000]"  # as good as nothing, and without a sign
    assert Estimate(math.nan, math.nan, math.nan).text(2) == "-"


def test_only_shares_of_words_end_at_one():
    values = np.array([7.0, 6.5, 7.5, 7.2])
    assert estimate("task: distinct_facts", values).high > 7.0
    assert estimate("task: distinct_2", np.array([0.99, 0.5, 0.7])).high == 1.0
