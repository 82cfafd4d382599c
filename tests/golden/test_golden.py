"""Our formulas against what rlax, verl and TRL made of the same numbers; record_*.py says how they were recorded.

Agreement is to 1e-6, in fp64. Where a package departs from ours on purpose, the departure stands in the test.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.golden.recorded import FOLDER, close, gradient_is, load, recorded
from upslope.algo import (
    AdaptiveKL,
    bradley_terry_loss,
    cispo_loss,
    clipped_policy_loss,
    discounted_returns,
    gae,
    group_advantages,
    importance_weights,
    kl_estimate,
    policy_gradient_loss,
    reduce,
    sequence_clipped_loss,
    surrogate_loss,
    token_kl,
    token_logprobs,
    token_weights,
    value_loss,
    whiten,
)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_every_record_says_what_made_it(path):
    made = json.loads(path.read_text())["made"]
    assert made["package"] in made["versions"] and made["date"] and made["python"]
    script = Path(made["command"].split()[1])
    assert script.parent.name == "golden" and (FOLDER / script.name).exists()


# returns and advantages


@recorded("rlax", "discounted_returns")
def test_c19_discounted_returns(case):
    close(discounted_returns(case.reward_A, case.starts, gamma=case.gamma, bootstrap_B=case.bootstrap_B), case.return_A)


@recorded("rlax", "gae")
def test_c19_gae_with_bootstrap(case):
    advantage, returns = gae(
        case.reward_A, case.value_A, case.starts, gamma=case.gamma, lam=case.lam, bootstrap_B=case.bootstrap_B
    )
    close(advantage, case.advantage_A)
    close(returns, case.return_A)  # rlax's lambda return


@recorded("trl_ppo", "gae")
def test_c19_gae_of_a_ppo_run(case):
    advantage, returns = gae(case.reward_A, case.value_A, case.starts, gamma=case.gamma, lam=case.lam)
    close(advantage, case.advantage_A)
    close(returns, case.return_A)


def sample_deviation(x):
    """What verl and TRL divide by where we divide by the population's: n - 1 for n."""
    return math.sqrt((len(x) - 1) / len(x))


@recorded("verl", "gae")
def test_c19_gae_that_ends_with_its_episode(case):
    advantage, returns = gae(case.reward_A, case.value_A, case.starts, gamma=case.gamma, lam=case.lam)
    close(returns, case.return_A)
    close(whiten(advantage) * sample_deviation(advantage), case.whitened_advantage_A)


@recorded("verl", "reinforce++")
def test_c23_reinforce_plus_plus(case):
    returns = discounted_returns(case.reward_A, case.starts, gamma=case.gamma)
    close(returns, case.return_A)
    close(whiten(returns) * sample_deviation(returns), case.whitened_advantage_A)


def test_c23_whitening():
    case = load("verl", "masked_whiten")
    factor, mean = sample_deviation(case.x_A), case.x_A.mean()
    close(whiten(case.x_A) * factor, case.shifted_A)
    close((whiten(case.x_A, shift_mean=False) - mean) * factor + mean, case.scaled_A)
    case = load("trl_ppo", "masked_whiten")
    close(whiten(case.x_A) * sample_deviation(case.x_A), case.whitened_A)


def test_c25_group_advantages():
    grpo, plain, dr, rloo = (load("verl", f"group/{n}") for n in ("grpo", "grpo as it comes", "dr-grpo", "rloo"))
    score, group = grpo.score_B, grpo.group_B
    close(group_advantages(score, group), dr.advantage_B)
    close(group_advantages(score, group, baseline="leave_one_out"), rloo.advantage_B)
    size = torch.bincount(group)[group]
    ours = group_advantages(score, group, scale="std") * ((size - 1) / size).sqrt()  # verl's deviation is the sample's
    close(ours, grpo.advantage_B)
    # as it comes, 1e-6 is added to the deviation: a relative difference of 1e-6 over it, and 0 where all are equal
    torch.testing.assert_close(ours, plain.advantage_B, atol=0, rtol=1e-6 / 0.5)


# policy losses


@recorded("verl", "vanilla")
def test_c29_clipped_loss_with_dual_clip_and_two_bounds(case):
    check_policy_loss(
        case,
        lambda logp: clipped_policy_loss(
            logp,
            case.old_logp_A,
            case.advantage_A,
            clip_low=case.clip_ratio_low,
            clip_high=case.clip_ratio_high,
            dual_clip=case.clip_ratio_c,
        ),
        case.clipped + case.dual_clipped,
    )


@recorded("verl", "gspo")
def test_c29_gspo(case):
    check_policy_loss(
        case,
        lambda logp: sequence_clipped_loss(
            logp,
            case.old_logp_A,
            case.advantage_A,
            case.starts,
            clip_low=case.clip_ratio_low,
            clip_high=case.clip_ratio_high,
        ),
        case.clipped,
    )


@recorded("verl", "cispo")
def test_c29_cispo(case):
    check_policy_loss(
        case,
        lambda logp: cispo_loss(logp, case.old_logp_A, case.advantage_A, clip_high=case.clip_ratio_high),
        case.clipped,
    )


def check_policy_loss(case, loss, clipped):
    logp = case.logp_A.clone().requires_grad_()
    loss_A, stats = loss(logp)
    weight_A = token_weights(case.starts, case.reduction, limit=case.limit).double()
    total = (weight_A * loss_A).sum()
    close(total, case.loss)
    gradient_is(total, logp, case.gradient_A)
    close(stats["clipped_A"].mean(), clipped)


@recorded("trl", "grpo")
def test_c26_grpo_and_its_kin(case):
    logp = case.logp_A.clone().requires_grad_()
    advantage = case.advantage_B.repeat_interleave(case.lengths)
    clips = {"clip_low": case.clip_low, "clip_high": case.clip_high}
    if "sequence clip" in case.name:
        loss_A, _ = sequence_clipped_loss(logp, case.old_logp_A, advantage, case.starts, **clips)
    elif "cispo" in case.name:
        loss_A, _ = cispo_loss(logp, case.old_logp_A, advantage, clip_high=case.clip_high - 1)  # TRL's bounds the ratio
    else:
        loss_A, _ = clipped_policy_loss(logp, case.old_logp_A, advantage, dual_clip=case.dual_clip, **clips)
    if "importance" in case.name:
        loss_A = loss_A * case.weight_A
    if case.beta:
        loss_A = loss_A + case.beta * kl_estimate(logp, case.ref_logp_A, "k3")
    total = (token_weights(case.starts, case.reduction, limit=case.limit).double() * loss_A).sum()
    close(total, case.loss)
    gradient_is(total, logp, case.gradient_A)


@recorded("trl_ppo", "losses")
def test_c29_losses_of_a_ppo_run(case):
    loss_A, _ = clipped_policy_loss(
        case.logp_A, case.old_logp_A, case.advantage_A, clip_low=case.clip, clip_high=case.clip
    )
    close(reduce(loss_A, len(loss_A)), case.policy_loss)
    loss_A, stats = value_loss(case.value_A, case.value_return_A, old_value_A=case.old_value_A, clip=case.value_clip)
    close(reduce(loss_A, len(loss_A)), case.value_loss)
    close(stats["clipped_A"].mean(), case.value_clipped)


def chosen(case, key):
    """Log-probabilities of the recorded actions as a function of logits, through our own projection."""
    logits = getattr(case, key).clone().requires_grad_()
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    return logits, token_logprobs(logits, identity, case.action_N)[0]


def test_ratios_and_the_score_function_loss():
    case = load("rlax", "ratio")
    _, stats = surrogate_loss(chosen(case, "logits_NV")[1], chosen(case, "old_logits_NV")[1], case.advantage_N)
    close(stats["ratio_A"], case.ratio_N)
    case = load("rlax", "policy_gradient_loss")
    logits, logp = chosen(case, "logits_NV")
    loss_N, _ = policy_gradient_loss(logp, case.advantage_N)
    close(loss_N.mean(), case.mean)
    gradient_is(loss_N.mean(), logits, case.gradient_NV)


@recorded("rlax", "clipped_surrogate")
def test_c29_clipped_loss_by_the_logits(case):
    logits, logp = chosen(case, "logits_NV")
    old = chosen(case, "old_logits_NV")[1]
    loss_N, _ = clipped_policy_loss(logp, old, case.advantage_N, clip_low=case.epsilon, clip_high=case.epsilon)
    close(loss_N.mean(), case.mean)
    gradient_is(loss_N.mean(), logits, case.gradient_NV)


# values, KL, importance


def test_value_losses():
    case = load("rlax", "value_loss")
    close(value_loss(case.value_N, case.return_N)[0], case.squared_N)
    close(value_loss(case.value_N, case.return_N, kind="huber")[0], case.huber_N)


@recorded("verl", "value_loss")
def test_c29_clipped_value_loss(case):
    value = case.value_A.clone().requires_grad_()
    loss_A, stats = value_loss(value, case.return_A, old_value_A=case.old_value_A, clip=case.clip)
    total = reduce(loss_A, len(loss_A))
    close(total, case.loss)
    gradient_is(total, value, case.gradient_A)
    close(stats["clipped_A"].mean(), case.clipped)


@recorded("verl", "kl/")
def test_c31_kl_estimators(case):
    logp = case.logp_A.clone().requires_grad_()
    found = kl_estimate(logp, case.ref_logp_A, case.name[-2:])
    close(found, case.kl_A)
    gradient_is(found.sum(), logp, case.gradient_A)


def test_c32_kl_in_the_reward():
    case = load("verl", "kl_in_reward")
    close(case.score_A - case.coefficient * kl_estimate(case.logp_A, case.ref_logp_A, "k1"), case.reward_A)


def test_c33_adaptive_kl():
    case = load("verl", "adaptive_kl")
    ours = AdaptiveKL(case.target, case.horizon, case.coefficient_before)
    for kl, after in zip(case.kl.tolist(), case.coefficient.tolist(), strict=True):
        ours.update(kl, case.episodes)
        assert ours.coefficient == pytest.approx(after, rel=1e-9)


@recorded("verl", "importance")
def test_c51_importance_weights(case):
    weight, stats = importance_weights(
        case.log_ratio_A, torch.zeros_like(case.log_ratio_A), kind=case.kind, cap=case.cap
    )
    close(weight, case.weight_A)
    if case.kind == "mask":
        close(stats["cut_A"].mean(), case.cut)


@recorded("rlax", "vtrace_one_step")
def test_c51_truncated_weights_on_td_errors_are_one_step_of_vtrace(case):
    weight, _ = importance_weights(case.log_ratio_A, torch.zeros_like(case.log_ratio_A), cap=case.cap)
    td, _ = gae(case.reward_A, case.value_A, case.starts, gamma=case.gamma, lam=0.0, bootstrap_B=case.bootstrap_B)
    close(weight * td, case.error_A)


# distributions and rewards


@recorded("rlax", "softmax")
def test_c17_c34_distributions_of_rlax(case):
    check_distribution(case, case.temperature)


@recorded("trl", "softmax")
def test_c17_c34_distributions_of_trl(case):
    check_distribution(case, case.temperature)


def test_c34_distributions_of_verl():
    check_distribution(load("verl", "softmax"), 1.0)


def check_distribution(case, temperature):
    """Our projection is by a matrix with a right inverse, so the hidden states are the logits in other words."""
    vocab = case.logits_NV.shape[1]
    turn = torch.linalg.qr(torch.arange(vocab**2).reshape(vocab, vocab).sin().double()).Q
    logits = case.logits_NV.clone().requires_grad_()
    hidden = logits @ turn  # hidden turn^T = logits
    logp, entropy = token_logprobs(hidden, turn, case.action_N, temperature=temperature, chunk=4)
    found = {"logp": logp, "entropy": entropy}
    if hasattr(case, "other_NV"):
        other = case.other_NV @ turn
        found["kl"] = token_kl(hidden, turn, other, turn, temperature=temperature, chunk=4)
    for key, value in found.items():
        close(value, getattr(case, f"{key}_N"))
        if hasattr(case, f"{key}_gradient_NV"):
            gradient_is(value.sum(), logits, getattr(case, f"{key}_gradient_NV"))


@recorded("trl", "bradley_terry")
def test_bradley_terry(case):
    pair = case.chosen_B.clone().requires_grad_(), case.rejected_B.clone().requires_grad_()
    loss_B, stats = bradley_terry_loss(*pair, margin_B=case.margin_B)
    close(loss_B.mean(), case.mean)
    gradient_is(loss_B.mean(), pair[0], case.gradient[: len(pair[0])])
    gradient_is(loss_B.mean(), pair[1], case.gradient[len(pair[0]) :])
    close(stats["correct_B"].mean(), case.accuracy)
