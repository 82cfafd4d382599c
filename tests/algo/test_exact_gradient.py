"""The mean of each estimator, summed over all that can be sampled, against the gradient it is meant to be."""

import statistics

import pytest
import torch

from tests.algo.mdp import Batch, Process, cosine
from upslope.algo import (
    clipped_policy_loss,
    discounted_returns,
    gae,
    group_advantages,
    policy_gradient_loss,
    sequence_clipped_loss,
    surrogate_loss,
    token_weights,
    whiten,
)

WORLDS = [(2, 0), (2, 1), (3, 2)]  # horizon, seed


@pytest.fixture(params=WORLDS, ids=lambda w: f"{w[0]}_steps_{w[1]}")
def process(request):
    return Process(*request.param)


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def differs(found, expected):
    """Not the same, and not a multiple of it: no learning rate makes up for it."""
    assert (found - expected).norm() > 1e-3 * expected.norm()
    assert cosine(found, expected) < 0.9999


def mean_step(batch, advantage_A, weight_A=1.0, loss=policy_gradient_loss):
    old = (batch.logp_A.detach(),) if loss is not policy_gradient_loss else ()
    return batch.mean_step(loss(batch.logp_A, *old, advantage_A)[0], weight_A)


def test_the_process_is_one(process):
    chances = [process.chance(e) for e in process.episodes]
    assert sum(chances) == pytest.approx(1.0, abs=1e-12)
    assert {len(e) for e in process.episodes} == set(range(1, process.horizon + 1))
    returns = [sum(r * 0.9**t for t, r in enumerate(process.rewards(e))) for e in process.episodes]
    value = sum(p * float(r) for p, r in zip(chances, returns, strict=True))
    assert float(process.exact_critic(0.9)[0]) == pytest.approx(value, abs=1e-12)


# one sample


@pytest.mark.parametrize("baseline", ["none", "constant", "critic"])
@pytest.mark.parametrize("credit", ["to_go", "episode"])
def test_c35_reinforce_is_unbiased(process, credit, baseline):
    batch = Batch.of(process)
    to_go = discounted_returns(batch.reward_A, batch.starts, gamma=1.0)
    worth = to_go if credit == "to_go" else batch.spread(batch.totals(batch.reward_A))
    level = {"none": 0.0, "constant": 1.7, "critic": process.critic_S[batch.state_A]}[baseline]
    same(mean_step(batch, worth - level), process.return_gradient())


def test_c35_the_same_of_every_on_policy_loss(process):
    batch = Batch.of(process)
    to_go = discounted_returns(batch.reward_A, batch.starts, gamma=1.0)
    for loss in (surrogate_loss, clipped_policy_loss):
        same(mean_step(batch, to_go, loss=loss), process.return_gradient())
    whole = batch.spread(batch.totals(batch.reward_A))
    # GSPO's ratio is a mean over tokens, and so is its step: the length makes it whole
    loss_A, _ = sequence_clipped_loss(batch.logp_A, batch.logp_A.detach(), whole, batch.starts)
    same(batch.mean_step(loss_A), process.return_gradient())


@pytest.mark.parametrize("gamma", [0.9, 0.3])
def test_c35_a_discount_needs_its_power_at_every_step(process, gamma):
    batch = Batch.of(process)
    returns = discounted_returns(batch.reward_A, batch.starts, gamma=gamma)
    same(mean_step(batch, returns, gamma**batch.step_A), process.return_gradient(gamma))
    differs(mean_step(batch, returns), process.return_gradient(gamma))  # as everybody does it


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_c19_gae_with_lambda_one_is_unbiased_whatever_the_critic_says(process, gamma):
    batch = Batch.of(process)
    advantage, _ = gae(batch.reward_A, process.critic_S[batch.state_A], batch.starts, gamma=gamma, lam=1.0)
    same(mean_step(batch, advantage, gamma**batch.step_A), process.return_gradient(gamma))


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_c19_gae_of_any_lambda_is_unbiased_with_the_exact_critic(process, gamma, lam):
    batch = Batch.of(process)
    value_A = process.exact_critic(gamma)[batch.state_A]
    advantage, _ = gae(batch.reward_A, value_A, batch.starts, gamma=gamma, lam=lam)
    same(mean_step(batch, advantage, gamma**batch.step_A), process.return_gradient(gamma))


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_c19_the_bias_of_gae_is_what_the_critic_is_wrong_by_later(process, lam):
    """With e = V - V_exact: (1 - lam) sum over l >= 1 of lam^(l-1) e(s_t+l), at every action; e(s_t) is a baseline."""
    batch = Batch.of(process)
    value_A = process.critic_S[batch.state_A]
    advantage, _ = gae(batch.reward_A, value_A, batch.starts, gamma=1.0, lam=lam)
    wrong_A = value_A - process.exact_critic()[batch.state_A]
    later_A = torch.zeros_like(wrong_A)
    for start, end in zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True):
        for t in range(start, end):
            later_A[t] = (1 - lam) * sum(lam ** (u - t - 1) * wrong_A[u] for u in range(t + 1, end))
    bias = mean_step(batch, later_A)
    assert bias.norm() > 1e-3
    same(mean_step(batch, advantage), process.return_gradient() + bias)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_c20_an_episode_cut_short_is_unbiased_with_the_exact_critic_behind_the_cut(lam):
    process = Process(3, 5)
    exact_S = process.exact_critic()
    batch = Batch.of(process)
    early_A = batch.step_A < 2
    cut_B = batch.lengths.clamp(max=2)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), cut_B.cumsum(0)])
    third = [process.row.get(e[:2], None) if len(e) > 2 else None for e in process.episodes]
    bootstrap_B = torch.stack([exact_S[s] if s is not None else torch.zeros((), dtype=torch.float64) for s in third])
    value_A, reward_A = exact_S[batch.state_A][early_A], batch.reward_A[early_A]
    early_S = torch.tensor([len(prefix) < 2 for prefix in process.row])

    def step(bootstrap):
        advantage_A = torch.zeros_like(batch.reward_A)
        advantage_A[early_A] = gae(reward_A, value_A, starts, gamma=1.0, lam=lam, bootstrap_B=bootstrap)[0]
        return mean_step(batch, advantage_A)[early_S]

    same(step(bootstrap_B), process.return_gradient()[early_S])
    differs(step(torch.zeros_like(bootstrap_B)), process.return_gradient()[early_S])


# groups


@pytest.mark.parametrize("n", [2, 3])
def test_c35_leave_one_out_is_unbiased_and_the_mean_baseline_a_share_of_it(n):
    process = Process(2, 3)
    batch = Batch.of(process, n)
    score_B = batch.totals(batch.reward_A)
    exact = process.return_gradient()
    for baseline, share in [("leave_one_out", 1.0), ("mean", (n - 1) / n), ("none", 1.0)]:
        advantage_B = group_advantages(score_B, batch.group_B, baseline=baseline)
        same(mean_step(batch, batch.spread(advantage_B)), exact * share)


def test_c35_leave_one_out_over_three_steps():
    process = Process(3, 4)
    batch = Batch.of(process, 2)
    advantage_B = group_advantages(batch.totals(batch.reward_A), batch.group_B, baseline="leave_one_out")
    same(mean_step(batch, batch.spread(advantage_B)), process.return_gradient())


def test_c26_grpo_in_pairs_climbs_the_chance_to_win_not_the_reward(process):
    """Over its deviation, the better of two is worth 1 and the other -1, however far apart they are."""
    batch = Batch.of(process, 2)
    advantage_B = group_advantages(batch.totals(batch.reward_A), batch.group_B, scale="std")
    found = mean_step(batch, batch.spread(advantage_B))
    total = {e: float(sum(process.rewards(e))) for e in process.episodes}
    chance = {e: process.chance(e) for e in process.episodes}
    sign = lambda x: float(x > 0) - float(x < 0)
    wins = lambda e: sum(chance[o] * sign(total[e] - total[o]) for o in process.episodes)
    same(found, process.exact_gradient(wins))
    differs(found, process.return_gradient())


def test_c26_grpo_in_threes_is_biased_by_the_deviation():
    process = Process(2, 3)
    batch = Batch.of(process, 3)
    score_B = batch.totals(batch.reward_A)
    found = mean_step(batch, batch.spread(group_advantages(score_B, batch.group_B, scale="std")))
    written = []
    for three in score_B.reshape(-1, 3).tolist():
        mean, deviation = statistics.fmean(three), statistics.pstdev(three)
        written += [(s - mean) / deviation if len(set(three)) > 1 else 0.0 for s in three]
    same(found, mean_step(batch, batch.spread(torch.tensor(written, dtype=torch.float64))))
    differs(found, process.return_gradient())


def test_c23_advantages_whitened_over_a_rollout_are_biased():
    process = Process(2, 3)
    batch = Batch.of(process, 2)
    to_go = discounted_returns(batch.reward_A, batch.starts, gamma=1.0)
    rollouts = to_go.split(torch.bincount(batch.spread(batch.group_B)).tolist())
    found = mean_step(batch, torch.cat([whiten(x) for x in rollouts]))
    written = []
    for rollout in (x.tolist() for x in rollouts):
        mean, variance = statistics.fmean(rollout), statistics.pvariance(rollout)
        written += [(x - mean) / (variance + 1e-8) ** 0.5 if len(set(rollout)) > 1 else 0.0 for x in rollout]
    same(found, mean_step(batch, torch.tensor(written, dtype=torch.float64)))
    differs(found, process.return_gradient())


# reductions


def reduced(batch, kind, **options):
    """token_weights of each group as a batch of its own, times its size, which weight_B has divided by already."""
    n = int((batch.group_B == 0).sum())
    parts = [
        token_weights(batch.starts[i : i + n + 1] - batch.starts[i], kind, **options)
        for i in range(0, len(batch.lengths), n)
    ]
    return torch.cat(parts).double() * n


@pytest.mark.parametrize("n", [1, 2])
def test_c26_the_constant_reduction_is_unbiased_up_to_its_constant(n):
    process = Process(3, 2)
    batch = Batch.of(process, n)
    to_go = discounted_returns(batch.reward_A, batch.starts, gamma=1.0)
    found = mean_step(batch, to_go, reduced(batch, "constant", limit=5))
    torch.testing.assert_close(found, process.return_gradient() / 5, atol=1e-7, rtol=1e-6)  # its weights are fp32


@pytest.mark.parametrize("n", [1, 2])
def test_c26_the_sequence_reduction_climbs_the_reward_per_token(n):
    process = Process(3, 2)
    batch = Batch.of(process, n)
    whole = batch.spread(batch.totals(batch.reward_A))
    found = mean_step(batch, whole, reduced(batch, "sequence"))
    expected = process.exact_gradient(lambda e: sum(process.rewards(e)) / len(e))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    differs(found, process.return_gradient())


def test_c26_the_token_reduction_weighs_an_episode_by_the_length_of_its_company():
    process = Process(3, 2)
    batch = Batch.of(process, 2)
    whole = batch.spread(batch.totals(batch.reward_A))
    found = mean_step(batch, whole, reduced(batch, "token"))
    chance = {e: process.chance(e) for e in process.episodes}
    company = lambda e: sum(p * 2 / (len(e) + len(o)) for o, p in chance.items())
    expected = process.exact_gradient(lambda e: sum(process.rewards(e)) * company(e))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    differs(found, process.return_gradient())
