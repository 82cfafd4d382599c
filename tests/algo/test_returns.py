import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.algo import discounted_returns, gae, group_advantages

T = torch.tensor


def reference_gae(rewards, values, bootstrap, gamma, lam):
    """The recursion of eq. 16 for one episode, written out in Python floats."""
    advantages, after = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(values) else bootstrap
        after = rewards[t] + gamma * following - values[t] + gamma * lam * after
        advantages[t] = after
    return advantages


def test_c19_gae_by_hand():
    # delta = [1 + .5*2 - 1, 2 + .5*0 - 2] = [1, 0]; A = [1 + .25*0, 0]
    advantage, returns = gae(T([1.0, 2.0]), T([1.0, 2.0]), T([0, 2]), gamma=0.5, lam=0.5)
    assert advantage.tolist() == [1.0, 0.0]
    assert returns.tolist() == [2.0, 2.0]


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_c19_gae_equals_the_written_out_recursion(lengths, gamma, lam, seed):
    draw = random.Random(seed)
    rewards = [[draw.gauss(0, 1) for _ in range(n)] for n in lengths]
    values = [[draw.gauss(0, 1) for _ in range(n)] for n in lengths]
    boots = [draw.gauss(0, 1) for _ in lengths]
    starts = T([0, *lengths]).cumsum(0)
    flat = lambda rows: torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    boot = torch.tensor(boots, dtype=torch.float64)
    advantage, returns = gae(flat(rewards), flat(values), starts, gamma=gamma, lam=lam, bootstrap_B=boot)
    expected = [reference_gae(r, v, b, gamma, lam) for r, v, b in zip(rewards, values, boots, strict=True)]
    torch.testing.assert_close(advantage, flat(expected))
    torch.testing.assert_close(returns, flat(expected) + flat(values))


def test_c19_lambda_one_is_the_return_minus_the_value_and_lambda_zero_the_td_error():
    reward, value, starts = torch.randn(9), torch.randn(9), T([0, 4, 9])
    returns = discounted_returns(reward, starts, gamma=0.9)
    torch.testing.assert_close(gae(reward, value, starts, gamma=0.9, lam=1.0)[0], returns - value)
    following = torch.cat([value[1:4], T([0.0]), value[5:], T([0.0])])
    torch.testing.assert_close(gae(reward, value, starts, gamma=0.9, lam=0.0)[0], reward + 0.9 * following - value)


def test_c20_truncated_completions_bootstrap():
    # a constant reward of 1 for ever is worth 1 / (1 - gamma); a truncated episode whose critic knows has no advantage
    gamma, worth = 0.9, 10.0
    value = torch.full((5,), worth)
    cut, _ = gae(torch.ones(5), value, T([0, 5]), gamma=gamma, lam=0.95, bootstrap_B=T([worth]))
    ended, _ = gae(torch.ones(5), value, T([0, 5]), gamma=gamma, lam=0.95, bootstrap_B=T([0.0]))
    torch.testing.assert_close(cut, torch.zeros(5), atol=1e-5, rtol=0)
    assert ended[-1] == pytest.approx(1 - worth)


def test_c38_discount_counts_action_tokens():
    returns = discounted_returns(T([0.0, 0.0, 1.0]), T([0, 3]), gamma=0.5)
    assert returns.tolist() == [0.25, 0.5, 1.0]


def test_c8_empty_episodes_change_nothing():
    reward = T([1.0, 2.0, 3.0])
    with_empty = discounted_returns(reward, T([0, 0, 1, 1, 3, 3]), gamma=0.5)
    assert with_empty.tolist() == discounted_returns(reward, T([0, 1, 3]), gamma=0.5).tolist() == [1.0, 3.5, 3.0]


def test_c30_advantages_are_detached():
    value = torch.randn(3, requires_grad=True)
    advantage, returns = gae(torch.randn(3), value, T([0, 3]), gamma=1.0, lam=0.9)
    assert not advantage.requires_grad and not returns.requires_grad


def test_a_million_tokens_take_milliseconds_not_seconds():
    lengths = torch.randint(1, 488, (4096,))
    starts = torch.cat([T([0]), lengths.cumsum(0)])
    reward, value = torch.randn(int(starts[-1])), torch.randn(int(starts[-1]))
    begin = time.perf_counter()
    gae(reward, value, starts, gamma=0.99, lam=0.95)
    assert time.perf_counter() - begin < 2.0  # a Python loop over tokens takes ten times that


def test_c25_group_advantages_by_hand():
    score, group = T([1.0, 3.0, 5.0, 5.0]), T([7, 7, 2, 2])
    assert group_advantages(score, group).tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert group_advantages(score, group, scale="std").tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert group_advantages(score, group, baseline="none").tolist() == score.tolist()


def test_c35_leave_one_out_is_the_mean_baseline_times_n_over_n_minus_1():
    score, group = torch.randn(12, dtype=torch.float64), T([0, 1, 2] * 4)
    mean = group_advantages(score, group)
    torch.testing.assert_close(group_advantages(score, group, baseline="leave_one_out"), mean * 4 / 3)


def test_c25_equal_scores_give_exactly_zero_whatever_their_size():
    score = torch.full((6,), 0.1) * 3  # a mean of such numbers leaves a residue in fp32
    for scale in ("none", "std"):
        assert group_advantages(score, T([0] * 6), scale=scale).tolist() == [0.0] * 6


def test_groups_of_one_have_no_leave_one_out_baseline():
    with pytest.raises(ValueError, match="at least two"):
        group_advantages(T([1.0]), T([0]), baseline="leave_one_out")


@pytest.mark.parametrize("starts", [[0, 2], [2, 4], [0, 3, 1, 4], [0, 5], []])
def test_offsets_that_leave_out_or_repeat_a_token_are_refused(starts):
    with pytest.raises(ValueError, match="4 tokens"):
        discounted_returns(torch.ones(4), torch.tensor(starts, dtype=torch.int64), gamma=0.5)
    with pytest.raises(ValueError, match="4 tokens"):
        gae(torch.ones(4), torch.ones(4), torch.tensor(starts, dtype=torch.int64), gamma=0.5, lam=0.5)


def test_a_bootstrap_value_too_many_is_refused():
    with pytest.raises(ValueError, match="2 bootstrap values for 1"):
        discounted_returns(torch.ones(2), T([0, 2]), gamma=0.5, bootstrap_B=torch.ones(2))


def test_c22_a_broken_episode_stays_alone():
    reward, value = torch.ones(6), T([1.0, 2.0, float("nan"), float("inf"), 1.0, 2.0])
    advantage, _ = gae(reward, value, T([0, 2, 4, 6]), gamma=0.9, lam=0.9)
    alone, _ = gae(torch.ones(2), T([1.0, 2.0]), T([0, 2]), gamma=0.9, lam=0.9)
    assert advantage[:2].tolist() == advantage[4:].tolist() == alone.tolist()


def test_nothing_is_made_on_another_device_than_the_inputs():
    reward, value, starts, boot = torch.ones(4), torch.ones(4), T([0, 1, 4]), torch.ones(2)
    score, group = T([1.0, 2.0, 4.0]), T([0, 0, 0])
    with torch.device("meta"):  # whatever forgets to say where it wants to be ends up here
        assert gae(reward, value, starts, gamma=0.9, lam=0.9, bootstrap_B=boot)[0].device.type == "cpu"
        assert discounted_returns(reward, starts, gamma=0.9).device.type == "cpu"
        for scale in ("none", "std"):
            assert group_advantages(score, group, scale=scale).device.type == "cpu"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_c54_a_failed_score_is_no_zero_in_its_group(bad):
    with pytest.raises(ValueError, match="1 of 3 scores"):
        group_advantages(T([1.0, bad, 3.0]), T([0, 0, 0]))


@pytest.mark.parametrize("score", [[0.0, 1e-30, 0.0], [1e8, 1e8 + 8, 1e8], [5.0, 8.0, 5.0]])
def test_c25_a_scaled_group_has_mean_zero_and_deviation_one_whatever_its_size_and_offset(score):
    advantage = group_advantages(T(score), T([0, 0, 0]), scale="std")
    torch.testing.assert_close(advantage, T([-1.0, 2.0, -1.0]) / 2**0.5, atol=1e-5, rtol=0)
