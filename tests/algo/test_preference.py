import math

import pytest
import torch

from upslope.algo import (
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    orpo_loss,
    simpo_loss,
)

T = torch.tensor
Z0 = T(0.0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kto_pair(chosen, rejected, ref_chosen, ref_rejected, z0=Z0, **options):
    """KTO of a desirable and an undesirable example for each pair: the losses of both, added."""
    logp, ref = torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected])
    loss, _ = kto_loss(logp, ref, torch.arange(len(logp)) < len(chosen), z0.to(logp), **options)
    return loss[: len(chosen)] + loss[len(chosen) :], {}


# every loss as a function of the same four tensors
ALL = {
    "bt": lambda c, r, a, b: bradley_terry_loss(c, r),
    "dpo": dpo_loss,
    "dpo, smoothed": lambda c, r, a, b: dpo_loss(c, r, a, b, label_smoothing=0.2),
    "ipo": ipo_loss,
    "simpo": lambda c, r, a, b: simpo_loss(c, r),
    "orpo": lambda c, r, a, b: orpo_loss(c, r),
    "kto": kto_pair,
}


def test_bradley_terry_by_hand():
    loss, stats = bradley_terry_loss(T([1.0, 0.0, 2.0]), T([0.0, 1.0, 2.0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(1)), math.log(2)])
    assert stats["correct_B"].tolist() == [1.0, 0.0, 0.5]
    assert stats["margin_B"].tolist() == [1.0, -1.0, 0.0]
    even = bradley_terry_loss(T([1.0]), T([0.0]), margin_B=T([1.0]))[0]
    assert even.item() == pytest.approx(math.log(2))


def test_dpo_by_hand():
    # log-ratios 2 and -3: a gap of 0.1 * 5
    loss, stats = dpo_loss(T([-10.0]), T([-8.0]), T([-12.0]), T([-5.0]), beta=0.1)
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.5)))
    assert stats["chosen_reward_B"].item() == pytest.approx(0.2)
    assert stats["rejected_reward_B"].item() == pytest.approx(-0.3)
    assert stats["margin_B"].item() == pytest.approx(0.5) and stats["correct_B"].item() == 1.0
    smooth, _ = dpo_loss(T([-10.0]), T([-8.0]), T([-12.0]), T([-5.0]), beta=0.1, label_smoothing=0.25)
    assert smooth.item() == pytest.approx(-0.75 * math.log(sigmoid(0.5)) - 0.25 * math.log(sigmoid(-0.5)))
    offset = {"beta": 0.1, "label_smoothing": 0.25, "margin_B": T([0.2])}
    smooth, _ = dpo_loss(T([-10.0]), T([-8.0]), T([-12.0]), T([-5.0]), **offset)
    assert smooth.item() == pytest.approx(-0.75 * math.log(sigmoid(0.3)) - 0.25 * math.log(sigmoid(-0.3)))


def test_ipo_by_hand():
    # log-ratios 0.5 and -0.5 per token: 1 away from 1 / (2 * 0.25) = 2
    loss, stats = ipo_loss(T([-1.0]), T([-2.0]), T([-1.5]), T([-1.5]), beta=0.25)
    assert loss.item() == pytest.approx(1.0)
    assert stats["margin_B"].item() == pytest.approx(0.25)


def test_simpo_by_hand():
    # 2 * (-1 - -1.4) = 0.8, above a target of 2 * 0.3 by 0.2
    loss, stats = simpo_loss(T([-1.0]), T([-1.4]), beta=2.0, margin=0.3)
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.2)))
    assert stats["margin_B"].item() == pytest.approx(0.8)
    default, _ = simpo_loss(T([-1.0]), T([-1.4]))
    assert default.item() == pytest.approx(-math.log(sigmoid(2 * 0.4 - 1.0)))  # the paper's gamma of 1


def test_orpo_by_hand():
    # p = 1/2 has odds of 1, p = 1/4 of 1/3: an odds ratio of 3, whose sigmoid of the log is 3/4
    loss, stats = orpo_loss(T([math.log(0.5)]), T([math.log(0.25)]), beta=0.2)
    assert loss.item() == pytest.approx(-0.2 * math.log(0.75))
    assert stats["chosen_reward_B"].item() == pytest.approx(0.0, abs=1e-6)
    assert stats["margin_B"].item() == pytest.approx(math.log(3))


def test_kto_by_hand():
    z0 = kto_reference_point(T([-1.0, -3.0]), T([-2.0, -5.0]))
    assert z0.item() == 1.5
    desirable = torch.tensor([True, False, True])
    weights = {"desirable_weight": 1.0, "undesirable_weight": 3.0}
    loss, stats = kto_loss(T([-1.0, -1.0, 0.0]), T([-4.0, -4.0, 0.0]), desirable, z0, beta=0.5, **weights)
    d = 0.5 * (3 - 1.5)
    assert loss.tolist() == pytest.approx([1 - sigmoid(d), 3 * (1 - sigmoid(-d)), 1 - sigmoid(-0.75)])
    assert stats["reward_B"].tolist() == [1.5, 1.5, 0.0]
    assert stats["margin_B"].tolist() == [d, -d, -0.75] and stats["correct_B"].tolist() == [1.0, 0.0, 0.0]


def test_ktos_reference_point_is_never_below_zero_and_gets_no_gradient():
    logp = T([-2.0, -3.0], requires_grad=True)
    z0 = kto_reference_point(logp, T([-1.0, -1.0]))
    assert z0.item() == 0.0 and not z0.requires_grad
    assert not kto_reference_point(logp, T([-5.0, -5.0])).requires_grad


def test_dpo_is_bradley_terry_on_implicit_rewards():
    torch.manual_seed(0)
    values = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    refs = [torch.randn(6, dtype=torch.float64) for _ in range(2)]
    loss, _ = dpo_loss(*values, *refs, beta=0.3)
    rewards = [0.3 * (v.detach() - r) for v, r in zip(values, refs, strict=True)]
    for reward in rewards:
        reward.requires_grad_()
    same, _ = bradley_terry_loss(*rewards)
    torch.testing.assert_close(loss, same)
    by_policy = torch.autograd.grad(loss.sum(), values)
    by_reward = torch.autograd.grad(same.sum(), rewards)
    for a, b in zip(by_policy, by_reward, strict=True):
        torch.testing.assert_close(a, 0.3 * b)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_ipo_at_its_optimum_has_no_gradient(beta):
    chosen = T([-1.0 + 0.25 / beta], dtype=torch.float64, requires_grad=True)
    rejected = T([-2.0 - 0.25 / beta], dtype=torch.float64, requires_grad=True)
    loss, stats = ipo_loss(chosen, rejected, T([-1.0]).double(), T([-2.0]).double(), beta=beta)
    for gradient in torch.autograd.grad(loss.sum(), (chosen, rejected)):
        assert gradient.item() == pytest.approx(0.0, abs=1e-12)
    assert stats["margin_B"].item() == pytest.approx(0.5)  # of the rewards, whatever beta is


def test_orpo_gradient_is_the_papers():
    """d(log odds)/d(log p) = 1 / (1 - p): with g = sigmoid(-gap), dL/dlogp_c = -beta g / (1 - p_c)."""
    chosen, rejected = T([math.log(0.6)], requires_grad=True), T([math.log(0.2)], requires_grad=True)
    loss, stats = orpo_loss(chosen, rejected, beta=0.1)
    loss.sum().backward()
    g = sigmoid(-stats["margin_B"].item())
    assert chosen.grad.item() == pytest.approx(-0.1 * g / 0.4)
    assert rejected.grad.item() == pytest.approx(0.1 * g / 0.8)


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_finite_differences(name):
    torch.manual_seed(1)
    chosen, rejected, a, b = (-torch.rand(4, dtype=torch.float64) - 0.1 for _ in range(4))
    chosen.requires_grad_(), rejected.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: ALL[name](c, r, a, b)[0], (chosen, rejected))


@pytest.mark.parametrize("name", ALL)
def test_single_precision_agrees_with_double(name):
    torch.manual_seed(2)
    values = [-3 * torch.rand(50) - 1e-3 for _ in range(4)]
    single = ALL[name](*values)[0]
    double = ALL[name](*(v.double() for v in values))[0]
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_c22_extreme_log_probabilities_give_no_nan(name):
    """Certain, nearly certain and impossible completions, on either side, of policy and reference."""
    extremes = T([0.0, -1e-30, -1e-9, -1e-7, -0.7, -88.0, -104.0, -1e4, -1e15])
    grid = torch.cartesian_prod(extremes, extremes, extremes)
    chosen, rejected = (grid[:, i].clone().requires_grad_() for i in (0, 1))
    loss, stats = ALL[name](chosen, rejected, grid[:, 2], grid[:, 2].flip(0))
    loss.sum().backward()
    for tensor in (loss, chosen.grad, rejected.grad, *stats.values()):
        assert torch.isfinite(tensor).all()


def test_orpo_keeps_digits_at_both_ends():
    small = orpo_loss(T([-30.0]), T([-31.0]))[1]["margin_B"].item()
    assert small == pytest.approx(1.0, rel=1e-6)  # where odds are p itself
    exact = math.log(-math.expm1(-2e-4) / -math.expm1(-1e-4)) + 1e-4  # log odds of 1e-4 less those of 2e-4
    assert orpo_loss(T([-1e-4]), T([-2e-4]))[1]["margin_B"].item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_c30_the_reference_and_the_statistics_carry_no_gradient(name):
    values = [torch.randn(3).neg().sub(3).requires_grad_() for _ in range(4)]
    loss, stats = ALL[name](*values)
    loss.sum().backward()
    assert values[0].grad is not None and values[2].grad is None and values[3].grad is None
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("name", [n for n in ALL if n != "bt"])
def test_a_step_down_the_gradient_widens_the_gap(name):
    chosen, rejected = T([-1.0], requires_grad=True), T([-1.0], requires_grad=True)
    ALL[name](chosen, rejected, T([-1.0]), T([-1.0]))[0].sum().backward()
    assert chosen.grad.item() < 0 < rejected.grad.item()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dpo_loss(x, x, x, x, beta=0.0), "beta must be positive: 0.0"),
        (lambda x: ipo_loss(x, x, x, x, beta=-1.0), "beta must be positive: -1.0"),
        (lambda x: simpo_loss(x, x, beta=0.0), "beta must be positive"),
        (lambda x: orpo_loss(x, x, beta=math.nan), "beta must be positive: nan"),
        (lambda x: kto_loss(x, x, x > 0, Z0, beta=0.0), "beta must be positive"),
        (lambda x: dpo_loss(x, x, x, x, label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\): 0.5"),
    ],
)
def test_settings_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call(T([-1.0]))
