import math

import pytest
import torch

from upslope.algo import clipped_policy_loss, policy_gradient_loss, value_loss

T = torch.tensor


def clipped(ratio, advantage, **options):
    loss, stats = clipped_policy_loss(T([math.log(ratio)]), T([0.0]), T([advantage]), **options)
    return loss.item(), stats["clipped_A"].item()


def test_the_articles_worked_numbers():
    _, stats = clipped_policy_loss(T([math.log(0.7)]), T([math.log(0.6)]), T([1.0]))
    assert stats["ratio_A"].item() == pytest.approx(1.1667, abs=5e-5)
    loss, was_clipped = clipped(1.2, 2.0)
    assert loss == pytest.approx(-2.4) and was_clipped == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "was_clipped"),
    [
        (1.5, 1.0, -1.2, 1.0),  # a gain is capped above
        (0.5, 1.0, -0.5, 0.0),  # and a loss is not
        (0.5, -1.0, 0.8, 1.0),  # the sign turned: capped below
        (1.5, -1.0, 1.5, 0.0),
        (1.0, 3.0, -3.0, 0.0),
    ],
)
def test_c29_clip_by_the_sign_of_the_advantage(ratio, advantage, loss, was_clipped):
    assert clipped(ratio, advantage) == (pytest.approx(loss), was_clipped)


def test_c29_dual_clip_bounds_the_loss_of_bad_actions():
    assert clipped(10.0, -1.0, dual_clip=3.0)[0] == pytest.approx(3.0)
    assert clipped(10.0, -1.0)[0] == pytest.approx(10.0)


def test_two_bounds_of_their_own():
    assert clipped(1.25, 1.0, clip_low=0.2, clip_high=0.28)[0] == pytest.approx(-1.25)
    assert clipped(1.3, 1.0, clip_low=0.2, clip_high=0.28)[0] == pytest.approx(-1.28)


def test_an_infinite_clip_on_policy_is_reinforce():
    logp = torch.randn(5, requires_grad=True)
    advantage = torch.randn(5)
    loss, _ = clipped_policy_loss(logp, logp.detach(), advantage, clip_low=1e9, clip_high=1e9)
    (from_clip,) = torch.autograd.grad(loss.sum(), logp)
    plain, _ = policy_gradient_loss(logp, advantage)
    (from_plain,) = torch.autograd.grad(plain.sum(), logp)
    torch.testing.assert_close(from_clip, from_plain)
    torch.testing.assert_close(from_plain, -advantage)


def test_c30_old_logprobs_and_advantages_get_no_gradient():
    logp, old, advantage = (torch.randn(4, requires_grad=True) for _ in range(3))
    clipped_policy_loss(logp, old, advantage)[0].sum().backward()
    assert logp.grad is not None and old.grad is None and advantage.grad is None


@pytest.mark.parametrize("options", [{"clip_low": 0.0}, {"clip_high": -0.1}, {"dual_clip": 1.0}])
def test_clips_that_cannot_be(options):
    with pytest.raises(ValueError, match="clips must be positive"):
        clipped_policy_loss(T([0.0]), T([0.0]), T([1.0]), **options)


def test_value_loss_by_hand():
    assert value_loss(T([3.0]), T([1.0]))[0].item() == 2.0
    assert value_loss(T([3.0]), T([1.0]), kind="huber")[0].item() == 1.5
    assert value_loss(T([1.5]), T([1.0]), kind="huber")[0].item() == 0.125


def test_c29_value_clipping_takes_the_larger_loss():
    # old 0, new 2, return 2: the clipped value 0.2 is further off, so its loss counts and no gradient flows
    value = T([2.0], requires_grad=True)
    loss, stats = value_loss(value, T([2.0]), old_value_A=T([0.0]), clip=0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.5 * 1.8**2)
    assert stats["clipped_A"].item() == 1.0 and value.grad.item() == 0.0


def test_c30_returns_get_no_gradient_and_a_clip_needs_old_values():
    value, returns = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    value_loss(value, returns)[0].sum().backward()
    assert value.grad is not None and returns.grad is None
    with pytest.raises(ValueError, match="old_value_A"):
        value_loss(T([0.0]), T([0.0]), clip=0.1)


def test_losses_agree_with_float64():
    torch.manual_seed(0)
    logp, old, advantage = (torch.randn(50) for _ in range(3))
    single = clipped_policy_loss(logp, old, advantage)[0]
    double = clipped_policy_loss(logp.double(), old.double(), advantage.double())[0]
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("advantage", "dual_clip"), [(1.0, None), (0.0, None), (-1.0, 3.0)])
def test_c22_a_ratio_that_overflows_where_a_bound_holds_has_no_gradient(advantage, dual_clip):
    logp = T([200.0, 0.0], requires_grad=True)
    loss, stats = clipped_policy_loss(logp, T([0.0, 0.0]), T([advantage, 1.0]), dual_clip=dual_clip)
    loss.sum().backward()
    assert logp.grad.tolist() == [0.0, -1.0]
    assert loss[0].item() == pytest.approx({1.0: -1.2, 0.0: 0.0, -1.0: 3.0}[advantage])
    assert stats["ratio_A"][0].item() == math.inf  # and what is reported is what is


def test_c22_a_ratio_that_overflows_unbounded_is_not_hidden():
    loss, _ = clipped_policy_loss(T([200.0]), T([0.0]), T([-1.0]))
    assert loss.item() == math.inf


def test_the_dual_clip_counts_as_clipped():
    assert clipped(10.0, -1.0, dual_clip=3.0)[1] == 1.0
    assert clipped(2.0, -1.0, dual_clip=3.0)[1] == 0.0


@pytest.mark.parametrize("drift", [1e-2, 1e-4, 1e-5, -1e-3])
def test_the_reported_kl_of_small_steps_is_no_rounding_error(drift):
    _, stats = clipped_policy_loss(T([drift]), T([0.0]), T([1.0]))
    assert stats["approx_kl_A"].item() == pytest.approx(drift**2 / 2, rel=0.03)


def test_a_value_clip_that_cannot_be():
    with pytest.raises(ValueError, match="clip must be positive"):
        value_loss(T([0.0]), T([0.0]), old_value_A=T([0.0]), clip=-0.1)
