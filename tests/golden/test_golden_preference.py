"""Our preference losses against what TRL made of the same log-probabilities."""

import pytest
import torch

from tests.golden.recorded import close, gradient_is, load, recorded
from upslope.algo import dpo_loss, ipo_loss, kto_loss, kto_reference_point, orpo_loss, simpo_loss


def sums(logp_A, lengths):
    """The log-probability of each whole completion."""
    return torch.stack([part.sum() for part in torch.split(logp_A, lengths.tolist())])


@pytest.fixture(scope="module")
def pairs():
    case = load("trl", "pairs")
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    return case.lengths, [sums(getattr(case, f"{n}_logp_A"), case.lengths) for n in names]


def check_pair(case, pairs, loss_of, per_token):
    """One pair's loss and the gradient at one token of each side; TRL averages per token for IPO alone."""
    lengths, logps = pairs
    length = lengths[case.pair] if per_token else 1
    four = [x[case.pair : case.pair + 1] / length for x in logps]
    four[0].requires_grad_()
    four[1].requires_grad_()
    loss_B, _ = loss_of(*four, beta=case.beta)
    close(loss_B[0], case.loss)
    gradient_is(loss_B.sum(), four[0], case.chosen_gradient * length)
    gradient_is(loss_B.sum(), four[1], case.rejected_gradient * length)


@recorded("trl", "dpo")
def test_c48_dpo(case, pairs):
    check_pair(case, pairs, dpo_loss, per_token=False)


@recorded("trl", "ipo")
def test_c48_ipo(case, pairs):
    check_pair(case, pairs, ipo_loss, per_token=True)


def test_dpo_with_smoothed_labels():
    case = load("trl", "smoothed")  # CPO's, which is DPO's with a reference that finds all completions alike
    even = torch.zeros_like(case.chosen_logp_B)
    options = {"beta": case.beta, "label_smoothing": case.label_smoothing}
    close(dpo_loss(case.chosen_logp_B, case.rejected_logp_B, even, even, **options)[0], case.loss_B)


@recorded("trl", "simpo")
def test_simpo(case):
    check_loss(case, lambda a, b: simpo_loss(a, b, beta=case.beta, margin=case.margin), 1e-6)


@recorded("trl", "orpo")
def test_orpo(case):
    # TRL computes the odds in fp32
    check_loss(case, lambda a, b: orpo_loss(a, b, beta=case.beta), 1e-5)


def check_loss(case, loss_of, tolerance):
    pair = case.chosen_logp_B.clone().requires_grad_(), case.rejected_logp_B.clone().requires_grad_()
    loss_B, _ = loss_of(*pair)
    gradients = torch.autograd.grad(loss_B.sum(), pair)
    expected = (case.loss_B, case.chosen_gradient_B, case.rejected_gradient_B)
    for found, recorded_one in zip((loss_B, *gradients), expected, strict=True):
        torch.testing.assert_close(found, recorded_one, atol=tolerance, rtol=tolerance)


@recorded("trl", "kto")
def test_kto(case):
    point = kto_reference_point(sums(case.other_logp_A, case.lengths), sums(case.ref_other_logp_A, case.lengths))
    close(point, case.reference_point)
    logp = sums(case.logp_A, case.lengths).requires_grad_()
    loss_B, _ = kto_loss(
        logp,
        sums(case.ref_logp_A, case.lengths),
        case.desirable_B,
        point,
        beta=case.beta,
        desirable_weight=case.desirable_weight,
        undesirable_weight=case.undesirable_weight,
    )
    close(loss_B.mean(), case.mean)
    gradient_is(loss_B.mean(), logp, case.gradient_B)
