"""Formulas that must be one another's special cases, in value and gradient."""

import pytest
import torch

from upslope.algo import (
    cispo_loss,
    clipped_policy_loss,
    conjugate_gradient,
    discounted_returns,
    gae,
    group_advantages,
    policy_gradient_loss,
    sequence_clipped_loss,
    surrogate_loss,
    token_weights,
    trust_region_step,
)

STARTS = torch.tensor([0, 3, 4, 9])


@pytest.fixture
def tokens():
    """Log-probabilities, those of the policy that sampled, advantages: ratios on both sides of any clip."""
    draw = torch.Generator().manual_seed(3)
    new, drift, advantage = (torch.randn(9, generator=draw, dtype=torch.float64) for _ in range(3))
    return (-new.abs()).requires_grad_(), -new.abs() + drift, advantage


def same(a, b, by):
    """Two losses of equal value and equal gradient."""
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    same_gradient(a, b, by)


def same_gradient(a, b, by):
    gradients = [torch.autograd.grad(x.sum(), by, retain_graph=True)[0] for x in (a, b)]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-10)


def test_a_clip_without_end_is_the_surrogate(tokens):
    clipped, stats = clipped_policy_loss(*tokens, clip_low=1e9, clip_high=1e9)
    same(clipped, surrogate_loss(*tokens)[0], tokens[0])
    assert stats["clipped_A"].sum() == 0
    assert clipped_policy_loss(*tokens)[1]["clipped_A"].sum() > 0  # and with an end it is not


def test_c16_at_ratio_one_every_loss_has_the_gradient_of_the_score_function(tokens):
    logp, _, advantage = tokens
    old = logp.detach()
    plain, _ = policy_gradient_loss(logp, advantage)
    same_gradient(surrogate_loss(logp, old, advantage)[0], plain, logp)
    same_gradient(clipped_policy_loss(logp, old, advantage, dual_clip=3.0)[0], plain, logp)
    same(cispo_loss(logp, old, advantage)[0], plain, logp)


def test_c26_grpo_with_one_epoch_is_its_policy_gradient(tokens):
    logp = tokens[0]
    score = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    advantage_B = group_advantages(score, torch.zeros(3, dtype=torch.int64), scale="std")
    advantage_A = advantage_B.repeat_interleave(STARTS.diff())
    weight_A = token_weights(STARTS, "sequence").double()
    loss_A, stats = clipped_policy_loss(logp, logp.detach(), advantage_A)
    same_gradient(weight_A * loss_A, weight_A * policy_gradient_loss(logp, advantage_A)[0], logp)
    assert stats["clipped_A"].sum() == 0


def test_gspo_of_single_tokens_is_the_token_clip(tokens):
    starts = torch.arange(10)
    clips = {"clip_low": 0.2, "clip_high": 0.3}
    whole, whole_stats = sequence_clipped_loss(*tokens, starts, **clips)
    single, stats = clipped_policy_loss(*tokens, **clips)
    same(whole, single, tokens[0])
    assert whole_stats["clipped_A"].tolist() == stats["clipped_A"].tolist() != [0.0] * 9


def test_gspo_at_ratio_one_is_the_score_function_of_whole_episodes(tokens):
    logp = tokens[0]
    advantage_A = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64).repeat_interleave(STARTS.diff())
    loss_A, _ = sequence_clipped_loss(logp, logp.detach(), advantage_A, STARTS)
    same_gradient(loss_A, policy_gradient_loss(logp, advantage_A)[0], logp)


def test_gspo_clips_all_tokens_of_an_episode_or_none(tokens):
    drift_A = torch.tensor(
        [0.9, -0.3, 0.0, 0.02, 0.5, -0.5, 0.3, -0.3, 0.01], dtype=torch.float64
    )  # means 0.2, 0.02, 0
    advantage_A = torch.ones_like(drift_A)
    _, stats = sequence_clipped_loss(drift_A, 0 * drift_A, advantage_A, STARTS, clip_low=0.05, clip_high=0.05)
    assert stats["clipped_A"].tolist() == [1.0] * 3 + [0.0] * 6
    _, by_token = clipped_policy_loss(drift_A, 0 * drift_A, advantage_A, clip_low=0.05, clip_high=0.05)
    assert by_token["clipped_A"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_c35_leave_one_out_is_n_over_n_minus_one_times_the_mean_baseline(n):
    score = torch.randn(4 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    group = torch.arange(4).repeat(n)
    alone = group_advantages(score, group, baseline="leave_one_out")
    torch.testing.assert_close(alone, n / (n - 1) * group_advantages(score, group))
    others = torch.stack([score[(group == g) & (torch.arange(4 * n) != i)].mean() for i, g in enumerate(group)])
    torch.testing.assert_close(alone, score - others)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_c19_gae_between_the_td_error_and_the_return(tokens, gamma):
    reward, value, _ = (t.detach() for t in tokens)
    tail = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    options = {"gamma": gamma, "bootstrap_B": tail}
    following = torch.stack([tail[[2, 3, 8].index(i)] if i in (2, 3, 8) else value[i + 1] for i in range(9)])
    td_error = reward + gamma * following - value
    torch.testing.assert_close(gae(reward, value, STARTS, lam=0.0, **options)[0], td_error)
    returns = discounted_returns(reward, STARTS, **options)
    torch.testing.assert_close(gae(reward, value, STARTS, lam=1.0, **options)[0], returns - value)
    summed = discounted_returns(td_error, STARTS, gamma=gamma * 0.7)
    torch.testing.assert_close(gae(reward, value, STARTS, lam=0.7, **options)[0], summed)


def positive_definite(n, condition):
    """A random symmetric matrix whose eigenvalues reach from 1 to its condition number."""
    draw = torch.Generator().manual_seed(n)
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=draw)).Q
    return turn @ torch.diag(torch.logspace(0, condition, n, dtype=torch.float64)) @ turn.t()


@pytest.mark.parametrize("n", [1, 2, 6, 12])
def test_c36_conjugate_gradients_solve_n_equations_in_n_products(n):
    matrix = positive_definite(n, 2)
    b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls = []

    def product(v):
        calls.append(v)
        return matrix @ v

    found = conjugate_gradient(product, b, steps=n, tolerance=0.0)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, b), atol=1e-8, rtol=1e-6)
    assert len(calls) == n
    if n > 2:
        fewer = conjugate_gradient(lambda v: matrix @ v, b, steps=n // 2)
        assert (fewer - found).norm() > 1e-3 * found.norm()


def test_c36_a_trust_region_step_on_a_quadratic_is_the_natural_gradient_at_the_bound():
    n, bound = 8, 0.01
    fisher = positive_definite(n, 1.5)
    gradient = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = lambda v: fisher @ v
    step = trust_region_step(conjugate_gradient(product, gradient, steps=n), product, max_kl=bound)
    natural = torch.linalg.solve(fisher, gradient)
    exact = natural * (2 * bound / (natural @ fisher @ natural)).sqrt()
    torch.testing.assert_close(step, exact, atol=1e-7, rtol=1e-5)
    assert (0.5 * step @ fisher @ step).item() == pytest.approx(bound, rel=1e-9)
    # no other step of that length in KL gains more
    draw = torch.Generator().manual_seed(2)
    for _ in range(50):
        other = torch.randn(n, dtype=torch.float64, generator=draw)
        other *= (2 * bound / (other @ fisher @ other)).sqrt()
        assert gradient @ other < gradient @ step
