"""Credit by hand: what each baseline and each scale makes of the same rewards."""

import pytest
import torch

from tests.training.test_rollout import BASE
from upslope.config import load_recipe
from upslope.training.algorithms import Signal, credit
from upslope.training.collect import charge_overlong, set_equal_groups_aside, set_lonely_aside
from upslope.training.controllers import Controllers
from upslope.training.episode import Episode

T = torch.tensor
REWARD = T([0.5, 1.0, 0.0, 3.0, 2.0, -1.0])  # three episodes: totals 1.5, 3, 1; the first two share a prompt
STARTS = T([0, 2, 4, 6])
VALUE = T([1.0, 0.5, 2.0, 1.0, 0.0, 0.5])


def credited(running=0.0, reward=REWARD, group=(0, 0, 1), **keys):
    defaults = {"reward": "a:b", "algorithm": "reinforce", "kl": 0.0, "samples": 2}
    rl = load_recipe(BASE | {"rl": defaults | keys}).rl
    signal = Signal(reward, VALUE, STARTS, torch.zeros(3), T(group), running)
    return credit(rl, signal)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"baseline": "none"}, [1.5, 1.0, 3.0, 3.0, 1.0, -1.0]),
        ({"baseline": "none", "gamma": 0.5}, [1.0, 1.0, 1.5, 3.0, 1.5, -1.0]),
        ({"baseline": "mean"}, [x - 8.5 / 6 for x in (1.5, 1.0, 3.0, 3.0, 1.0, -1.0)]),
        ({"baseline": "running", "running": 2.0}, [-0.5, -1.0, 1.0, 1.0, -1.0, -3.0]),
        ({"baseline": "critic", "critic": "shared"}, [0.5, 0.5, 1.0, 2.0, 1.0, -1.5]),
        ({"baseline": "group"}, [-0.75, -1.25, 0.75, 0.75, 0.0, -2.0]),
        ({"baseline": "none", "credit": "episode"}, [1.5, 1.5, 3.0, 3.0, 1.0, 1.0]),
        ({"baseline": "group", "credit": "episode"}, [-0.75, -0.75, 0.75, 0.75, 0.0, 0.0]),
        ({"baseline": "group", "credit": "episode", "scale": "group"}, [-1.0, -1.0, 1.0, 1.0, 0.0, 0.0]),
        ({"baseline": "critic", "credit": "episode", "critic": "shared"}, [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ({"baseline": "best", "credit": "episode"}, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]),
        (
            {"algorithm": "a2c", "lam": 0.0, "gamma": 0.5},
            [0.5 + 0.25 - 1.0, 1.0 - 0.5, 0.5 - 2.0, 3.0 - 1.0, 2.0 + 0.25, -1.0 - 0.5],
        ),
    ],
)
def test_c19_c35_advantages_by_hand(keys, expected):
    assert credited(**keys).advantage_A.tolist() == pytest.approx(expected, abs=1e-6)


def test_c35_leave_one_out_does_not_know_its_own_sample():
    found = credited(baseline="leave_one_out", group=(0, 0, 0)).advantage_A
    assert found.tolist() == pytest.approx([1.5 - 2.0, 1.0 - 2.0, 3.0 - 1.25, 3.0 - 1.25, 1.0 - 2.25, -1.0 - 2.25])


def test_c25_equal_totals_get_exactly_nothing_by_every_group_baseline():
    reward = T([0.1, 0.2, 0.2, 0.1, 0.1, 0.2])
    for keys in (
        {"baseline": "group", "scale": "group"},
        {"baseline": "leave_one_out"},
        {"baseline": "best"},
        {"baseline": "group"},
    ):
        found = credited(credit="episode", reward=reward, group=(0, 0, 0), **keys)
        assert found.advantage_A.tolist() == [0.0] * 6, keys


def test_c23_c24_whitening_is_over_actions_and_statistics_are_from_before_it():
    plain, scaled = credited(baseline="none"), credited(baseline="none", scale="batch")
    assert scaled.advantage_A.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert scaled.advantage_A.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert scaled.metrics == plain.metrics
    assert plain.metrics["advantage/std"] == pytest.approx(plain.advantage_A.std(correction=0).item())


def test_the_deviation_before_scaling_is_that_of_the_rewards_for_groups_too():
    wide = REWARD * 100
    one = credited(credit="episode", baseline="group", scale="group", group=(0, 0, 0)).metrics["advantage/std"]
    many = credited(credit="episode", baseline="group", scale="group", group=(0, 0, 0), reward=wide)
    assert many.metrics["advantage/std"] == pytest.approx(100 * one, rel=1e-5)
    assert many.advantage_A.abs().max() < 2


def test_what_the_running_baseline_remembers_is_the_mean_of_what_it_stands_against():
    assert credited(credit="episode", baseline="running").mean == pytest.approx((1.5 + 3.0 + 1.0) / 3)
    assert credited(baseline="running").mean == pytest.approx(8.5 / 6)


def test_c54_an_episode_left_alone_by_failures_has_no_group_to_be_compared_with():
    episodes = [made(1, t, g) for g, ts in enumerate([(1, 0, None), (None, 1, None), (None,) * 3]) for t in ts]
    set_lonely_aside(episodes)
    assert [e.used for e in episodes] == [True] * 3 + [False] * 6


def test_the_bias_of_the_lambda_return_is_measured_against_the_monte_carlo_return():
    full = credited(algorithm="a2c", lam=1.0).metrics
    assert full["advantage/bias"] == pytest.approx(0.0, abs=1e-6) and full["advantage/rmse"] < 1e-6
    short = credited(algorithm="a2c", lam=0.0).metrics
    gaps = [0.5 + 0.5 - 1.5, 0.0, 1.0 - 3.0, 0.0, 2.5 - 1.0, 0.0]  # r_t + V_{t+1} against what came
    assert short["advantage/bias"] == pytest.approx(sum(gaps) / 6, abs=1e-6)
    assert short["advantage/rmse"] == pytest.approx((sum(g * g for g in gaps) / 6) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"credit": "to_go", "baseline": "none"}, [1.0, 1.0, 5.0, 5.0]),
        ({"credit": "episode", "baseline": "none"}, [1.0, 1.0, 5.0, 5.0]),
        ({"credit": "episode", "baseline": "group"}, [-2.0, -2.0, 2.0, 2.0]),
        ({"credit": "to_go", "baseline": "group"}, [-2.0, -2.0, 2.0, 2.0]),
    ],
)
def test_c20_what_follows_a_cut_counts_in_every_kind_of_credit(keys, expected):
    rl = load_recipe(
        BASE | {"rl": {"reward": "a:b", "algorithm": "reinforce", "samples": 2, "limit": "bootstrap"} | keys}
    ).rl
    signal = Signal(T([0.0, 1.0, 0.0, 0.0]), torch.zeros(4), T([0, 2, 4]), T([0.0, 5.0]), T([0, 0]))
    assert credit(rl, signal).advantage_A.tolist() == expected


def made(length, total, group=0):
    actions = list(range(1, 1 + length))
    return Episode("p", "c", [1] * (1 + length), actions, [-1.0] * length, "eos", 0, group, 0, total=total)


def test_the_price_of_length_grows_over_the_last_share_of_the_limit():
    rl = load_recipe(BASE | {"rl": {"reward": "a:b", "max_tokens": 10, "overlong": 0.4}}).rl
    episodes = [made(n, 1.0) for n in (5, 6, 7, 8, 10)]
    charge_overlong(episodes, rl)
    assert [e.total for e in episodes] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.0])
    assert [e.rewards["overlong"] for e in episodes] == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0])
    failed = made(10, None)
    charge_overlong([failed], rl)
    assert failed.total is None


def test_groups_of_equal_totals_are_set_aside_and_counted():
    episodes = [made(1, t, g) for g, ts in enumerate([(1, 1), (0, 1), (None, 1), (None, None)]) for t in ts]
    assert set_equal_groups_aside(episodes) == 3
    assert [e.used for e in episodes] == [False, False, True, True, False, False, False, False]


def test_controllers_come_back_as_they_were_and_the_running_baseline_lags():
    keys = {"reward": "a:b", "kl_target": 1.0, "trust": {"penalty": 2.0, "target": 0.01}, "reward_norm": "running"}
    rl = load_recipe(BASE | {"rl": keys}).rl
    first = Controllers(rl)
    assert first.score_scale(rl) == 1.0
    first.saw_scores([1.0, 3.0])
    first.saw_scores([5.0, 7.0])
    assert first.score_scale(rl) == pytest.approx(5.0**0.5)  # the deviation of 1, 3, 5, 7
    first.saw_return(2.0)
    first.saw_return(4.0)
    assert first.returns == pytest.approx(2.2)
    first.kl.update(2.0, 100)
    first.trust.update(0.5)
    first.used = 9
    other = Controllers(rl)
    other.restore(first.state())
    assert other.state() == first.state() and other.trust.coefficient == 4.0
