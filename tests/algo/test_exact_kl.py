"""KL in the loss and in the reward, and samples of another policy: exact means over all that can be sampled."""

import pytest
import torch

from tests.algo.mdp import Batch, Process, cosine
from upslope.algo import (
    cispo_loss,
    clipped_policy_loss,
    discounted_returns,
    importance_weights,
    kl_estimate,
    policy_gradient_loss,
    reduce,
    surrogate_loss,
    token_kl,
)

BETA = 0.3


@pytest.fixture(params=[(2, 0), (3, 2)], ids=lambda w: f"{w[0]}_steps")
def process(request):
    return Process(*request.param)


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def differs(found, expected):
    assert (found - expected).norm() > 1e-3 * expected.norm() and cosine(found, expected) < 0.9999


def visits(batch):
    """How often each state is visited, without a gradient: what an estimator in a loss holds fixed."""
    count_S = torch.zeros(len(batch.process.row), dtype=torch.float64)
    return count_S.index_add(0, batch.state_A, batch.spread(batch.weight_B))


def descent(process, loss_S, batch):
    """The step that visits times a loss of each state asks for."""
    (gradient,) = torch.autograd.grad(-(visits(batch) * loss_S).sum(), process.logits_SV)
    return gradient


def exact_kl(process, reverse=False):
    """KL(policy, reference) of each state, or KL(reference, policy), by the sum over the vocabulary written out."""
    p, q = torch.log_softmax(process.logits_SV, -1), torch.log_softmax(process.ref_logits_SV, -1)
    return (q.exp() * (q - p)).sum(-1) if reverse else (p.exp() * (p - q)).sum(-1)


def mean_step_of(kind, batch):
    return batch.mean_step(kl_estimate(batch.logp_A, batch.ref_logp_A, kind))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_c31_k1_and_k3_are_unbiased_values_of_the_exact_kl(process, kind):
    batch = Batch.of(process)
    found = (batch.spread(batch.weight_B) * kl_estimate(batch.logp_A, batch.ref_logp_A, kind)).sum()
    same(found, (visits(batch) * exact_kl(process)).sum())


def test_c31_k2_is_a_biased_value(process):
    batch = Batch.of(process)
    found = (batch.spread(batch.weight_B) * kl_estimate(batch.logp_A, batch.ref_logp_A, "k2")).sum()
    assert abs(found - (visits(batch) * exact_kl(process)).sum()) > 1e-3


def test_c31_k1_in_the_loss_holds_nothing(process):
    same(mean_step_of("k1", Batch.of(process)), torch.zeros_like(process.logits_SV))


def test_c31_k2_in_the_loss_has_the_gradient_of_the_exact_kl(process):
    batch = Batch.of(process)
    expected = descent(process, exact_kl(process), batch)
    same(mean_step_of("k2", batch), expected)
    identity = torch.eye(3, dtype=torch.float64)
    same(descent(process, token_kl(process.logits_SV, identity, process.ref_logits_SV, identity), batch), expected)


def test_c31_k3_in_the_loss_has_the_gradient_of_the_other_kl(process):
    batch = Batch.of(process)
    found = mean_step_of("k3", batch)
    same(found, descent(process, exact_kl(process, reverse=True), batch))
    differs(found, descent(process, exact_kl(process), batch))


def test_c31_no_estimator_in_the_loss_sees_that_a_choice_leads_to_states_far_from_the_reference(process):
    """The KL of whole episodes has a second term in its gradient, by the visits: the KL that comes after a choice."""
    batch = Batch.of(process)
    whole = process.exact_gradient(lambda e: -sum(exact_kl(process)[process.row[e[:t]]] for t in range(len(e))))
    exact_A = exact_kl(process)[batch.state_A].detach()
    later_A = discounted_returns(exact_A, batch.starts, gamma=1.0) - exact_A
    second = batch.mean_step(policy_gradient_loss(batch.logp_A, -later_A)[0])
    same(mean_step_of("k2", batch) + second, whole)
    differs(mean_step_of("k2", batch), whole)


def test_c32_k1_in_the_reward_with_the_return_to_go_climbs_the_reward_minus_the_kl_of_episodes(process):
    batch = Batch.of(process)
    price_A = BETA * kl_estimate(batch.logp_A, batch.ref_logp_A, "k1").detach()
    to_go = discounted_returns(batch.reward_A - price_A, batch.starts, gamma=1.0)
    found = batch.mean_step(policy_gradient_loss(batch.logp_A, to_go)[0])

    def worth(e):  # with the exact KL of every state on the way, itself differentiated
        return sum(process.rewards(e)) - BETA * sum(exact_kl(process)[process.row[e[:t]]] for t in range(len(e)))

    same(found, process.exact_gradient(worth))
    differs(found, process.return_gradient())


# samples of another policy


def moved(process, scale, seed=7):
    """The same process, whose policy has since been moved; its samples stay those of the one before."""
    batch = Batch.of(process)
    old_A = batch.logp_A.detach()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        process.logits_SV += scale * torch.randn(process.logits_SV.shape, generator=draw, dtype=torch.float64)
    return batch, old_A


def test_the_surrogate_of_one_step_is_unbiased_however_far_the_policy_has_gone():
    process = Process(1, 3)
    batch, old_A = moved(process, 2.0)
    same(batch.mean_step(surrogate_loss(batch.logp_A, old_A, batch.reward_A)[0]), process.return_gradient())
    differs(batch.mean_step(clipped_policy_loss(batch.logp_A, old_A, batch.reward_A)[0]), process.return_gradient())


def test_c51_weights_that_no_cap_touches_make_anothers_samples_ones_own():
    process = Process(1, 3)
    batch, behaviour_A = moved(process, 0.8)
    weight_A, stats = importance_weights(batch.logp_A, behaviour_A, cap=1e6)
    assert stats["cut_A"].sum() == 0 and not weight_A.requires_grad
    same(batch.mean_step(policy_gradient_loss(batch.logp_A, batch.reward_A)[0], weight_A), process.return_gradient())


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_c51_the_bias_of_capped_weights_is_the_mass_that_the_cap_takes(kind):
    process = Process(1, 3)
    batch, behaviour_A = moved(process, 0.8)
    weight_A, stats = importance_weights(batch.logp_A, behaviour_A, kind=kind, cap=1.4)
    assert 0 < stats["cut_A"].sum() < len(weight_A)
    p_V, b_V = torch.softmax(process.logits_SV, -1)[0].detach(), batch.weight_B
    kept_V = torch.minimum(p_V, 1.4 * b_V) if kind == "truncate" else p_V * ((p_V <= 1.4 * b_V) & (1.4 * p_V >= b_V))
    step = batch.mean_step(policy_gradient_loss(batch.logp_A, batch.reward_A)[0], weight_A)
    logp_SV = torch.log_softmax(process.logits_SV, -1)
    (expected,) = torch.autograd.grad((kept_V * process.reward_SV[0] * logp_SV[0]).sum(), process.logits_SV)
    same(step, expected)
    assert (step - process.return_gradient()).norm() > 0.01


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_c51_weights_of_one_change_nothing(process, kind):
    batch = Batch.of(process)
    weight_A, stats = importance_weights(batch.logp_A, batch.logp_A.detach(), kind=kind, cap=1.001)
    assert weight_A.tolist() == [1.0] * len(weight_A) and stats["cut_A"].sum() == 0


def test_c51_a_masked_token_still_counts_in_the_denominator():
    logp, behaviour = torch.tensor([0.0, 0.0, 3.0, -3.0]), torch.zeros(4)
    weight, stats = importance_weights(logp, behaviour, kind="mask", cap=2.0)
    loss, _ = policy_gradient_loss(logp, -torch.ones(4))
    assert weight.tolist() == [1.0, 1.0, 0.0, 0.0] and stats["cut_A"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert reduce(weight * (loss - loss + 1.0), len(loss)).item() == 0.5


def test_cispo_is_the_score_function_under_cut_weights():
    process = Process(2, 3)
    batch, old_A = moved(process, 1.5)
    loss_A, stats = cispo_loss(batch.logp_A, old_A, batch.reward_A, clip_high=0.5)
    weight_A, _ = importance_weights(batch.logp_A, old_A, cap=1.5)
    assert 0 < stats["clipped_A"].sum() < len(weight_A)
    same(batch.mean_step(loss_A), batch.mean_step(policy_gradient_loss(batch.logp_A, batch.reward_A)[0], weight_A))
