import pytest
import torch

from upslope.algo import AdaptiveKL, explained_variance, kl_estimate, reduce, whiten

T = torch.tensor


def test_kl_estimators_by_hand():
    logp, ref = T([0.0]), T([-1.0])  # d = 1
    assert kl_estimate(logp, ref, "k1").item() == 1.0
    assert kl_estimate(logp, ref, "k2").item() == 0.5
    assert kl_estimate(logp, ref, "k3").item() == pytest.approx(torch.e**-1)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logp, ref, "k4")


def test_c31_expected_values_and_gradients_against_the_exact_kl():
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(6, dtype=torch.float64), 0)

    def expected(kind):
        """The mean over all tokens by the policy's own probabilities, and the mean of the estimator's gradient."""
        logp = torch.log_softmax(logits, 0)
        p = logp.detach().exp()
        estimate = kl_estimate(logp, ref, kind)
        return (p * estimate).sum().item(), torch.autograd.grad((p * estimate).sum(), logits)[0]

    def exact(forward=True):
        logp = torch.log_softmax(logits, 0)
        kl = (logp.exp() * (logp - ref)).sum() if forward else (ref.exp() * (ref - logp)).sum()
        return kl.item(), torch.autograd.grad(kl, logits)[0]

    true_value, true_gradient = exact()
    assert expected("k1")[0] == pytest.approx(true_value)
    assert expected("k3")[0] == pytest.approx(true_value)
    torch.testing.assert_close(expected("k1")[1], torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected("k2")[1], true_gradient)
    torch.testing.assert_close(expected("k3")[1], exact(forward=False)[1])


def test_c33_adaptive_kl_moves_once_a_rollout_and_keeps_its_state():
    controller = AdaptiveKL(target=2.0, horizon=100, coefficient=0.1)
    controller.update(4.0, 50)  # error 1 clipped to 0.2; 1 + 0.2 * 50 / 100
    assert controller.coefficient == pytest.approx(0.11)
    controller.update(1.9, 100)  # error -0.05
    assert controller.coefficient == pytest.approx(0.11 * 0.95)
    other = AdaptiveKL(target=2.0, horizon=100, coefficient=9.0)
    other.restore(controller.state())
    assert other.coefficient == controller.coefficient
    fixed = AdaptiveKL(target=None, horizon=None, coefficient=0.1)
    fixed.update(100.0, 1000)
    assert fixed.coefficient == 0.1


def test_c23_whitening_by_population_statistics():
    white = whiten(T([1.0, 3.0]))
    torch.testing.assert_close(white, T([-1.0, 1.0]), atol=1e-6, rtol=0)
    kept = whiten(T([1.0, 3.0]), shift_mean=False)
    torch.testing.assert_close(kept, T([1.0, 3.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("values", [[5.0], [0.1] * 7, []])
def test_c23_one_element_or_equal_ones_become_exactly_zero(values):
    assert whiten(T(values)).tolist() == [0.0] * len(values)


def test_explained_variance_by_hand():
    returns = T([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.zeros(3), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(T([1.0]), T([2.0])) == 0.0


def test_c27_parts_with_one_denominator_add_up_to_the_mean():
    x = torch.randn(10, dtype=torch.float64)
    parts = reduce(x[:1], 10) + reduce(x[1:7], 10) + reduce(x[7:], 10)
    torch.testing.assert_close(parts, x.mean())
    with pytest.raises(ValueError, match="nothing"):
        reduce(x, 0)


def test_c33_a_price_can_turn_neither_negative_nor_nan():
    controller = AdaptiveKL(target=1.0, horizon=100, coefficient=0.1)
    for kl, episodes in ((0.1, 500), (float("nan"), 10), (float("inf"), 10)):
        with pytest.raises(ValueError, match="cannot lead"):
            controller.update(kl, episodes)
    assert controller.coefficient == 0.1
    for target, horizon in ((0.0, 100), (1.0, 0), (-1.0, 100)):
        with pytest.raises(ValueError, match="positive"):
            AdaptiveKL(target=target, horizon=horizon, coefficient=0.1)


def test_explained_variance_of_equal_returns_is_zero_and_no_residue():
    torch.manual_seed(0)
    assert explained_variance(torch.randn(1000), torch.full((1000,), 3.3)) == 0.0
