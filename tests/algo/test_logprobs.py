import pytest
import torch

from upslope.algo import logprobs, token_logprobs


def plain(hidden, weight, target, temperature):
    logp = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    return logp.gather(1, target[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def make(n=7, d=5, v=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, dtype=torch.float64, generator=generator)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator)
    return hidden, weight, torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_plain_formula_whatever_the_chunk(chunk, temperature):
    hidden, weight, target = make()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    got = token_logprobs(ours[0], ours[1], target, temperature=temperature, chunk=chunk)
    expected = plain(theirs[0], theirs[1], target, temperature)
    pull = torch.linspace(-1, 1, 7, dtype=torch.float64)
    (got[0] @ pull + got[1] @ pull.flip(0)).backward()
    (expected[0] @ pull + expected[1] @ pull.flip(0)).backward()
    for a, b in zip([*got, ours[0].grad, ours[1].grad], [*expected, theirs[0].grad, theirs[1].grad], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", [0, 1])
def test_each_output_alone_passes_gradcheck(which):
    hidden, weight, target = make(4, 3, 6)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, target, chunk=3)[which], inputs)


def test_c17_temperature_divides_the_logits():
    hidden, weight, target = make()
    halved = token_logprobs(hidden / 0.5, weight, target)
    torch.testing.assert_close(token_logprobs(hidden, weight, target, temperature=0.5), halved)


def test_c34_entropy_is_of_the_tempered_distribution():
    hidden, weight, target = make()
    _, hot = token_logprobs(hidden, weight, target, temperature=100.0)
    torch.testing.assert_close(hot, torch.full((7,), 11.0, dtype=torch.float64).log(), atol=1e-2, rtol=0)


def test_no_tokens_no_harm():
    hidden, weight, target = make(0)
    logp, entropy = token_logprobs(hidden, weight, target)
    assert logp.shape == entropy.shape == (0,)


def test_bf16_products_fp32_softmax_and_gradients_in_the_parameters_dtype():
    hidden, weight, target = make(20, 16, 50)
    low = hidden.bfloat16().requires_grad_()
    master = weight.float().requires_grad_()
    logp, _ = token_logprobs(low, master, target)
    logp.sum().backward()
    assert logp.dtype == torch.float32 and low.grad.dtype == torch.bfloat16 and master.grad.dtype == torch.float32
    exact, _ = token_logprobs(hidden, weight, target)
    torch.testing.assert_close(logp.double(), exact, atol=0.15, rtol=0.02)


def test_a_frozen_projection_costs_no_gradient():
    hidden, weight, target = make()
    token_logprobs(hidden.requires_grad_(), weight, target)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_temperature_zero_is_refused():
    hidden, weight, target = make()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, weight, target, temperature=0.0)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_the_gradient_can_be_differentiated_again(which):
    hidden, weight, target = make(4, 3, 6)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())

    def chosen(h, w):
        outputs = token_logprobs(h, w, target, temperature=0.7, chunk=3)
        return tuple(outputs[i] for i in which)

    assert torch.autograd.gradgradcheck(chosen, inputs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_by_parts_of_the_vocabulary_equal_the_plain_formula(temperature, monkeypatch):
    for name, value in (("KEPT_BYTES", -1), ("CHUNK_BYTES", 0), ("ROWS", 5), ("SLICE", 70)):
        monkeypatch.setattr(logprobs, name, value)
    hidden, weight, target = make(13, 16, 150)
    pull = torch.randn(2, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = (hidden.requires_grad_(), weight.requires_grad_())
    inputs = tuple(x.detach().float().requires_grad_() for x in exact)

    def gradients(outputs, leaves):
        return torch.autograd.grad(sum((x.double() * p).sum() for x, p in zip(outputs, pull, strict=True)), leaves)

    found = gradients(token_logprobs(*inputs, target, temperature=temperature), inputs)
    for ours, expected in zip(found, gradients(plain(*exact, target, temperature), exact), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_second_backward_pass_has_the_gradients_of_the_first():
    hidden, weight, target = make(9, 16, 50)
    inputs = (hidden.float().detach().requires_grad_(), weight.float().detach().requires_grad_())
    logp = token_logprobs(*inputs, target)[0].sum()
    first = torch.autograd.grad(logp, inputs, retain_graph=True)
    for ours, again in zip(first, torch.autograd.grad(logp, inputs), strict=True):
        torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_the_gradient_of_no_rows_is_zero(kept, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 80 << 20 if kept else -1)
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))[0].sum().backward()
    assert hidden.grad.shape == (0, 4) and not weight.grad.any()


def test_the_weight_gradient_of_a_bf16_weight_is_summed_in_fp32():
    hidden, weight, target = make(4096, 32, 300)
    low = hidden.bfloat16()

    def gradient(chunk):
        w = (weight * 0.1).bfloat16().requires_grad_()
        token_logprobs(low, w, target, chunk=chunk)[0].sum().backward()
        return w.grad.double()

    w = (weight * 0.1).bfloat16().double().requires_grad_()
    plain(low.double(), w, target, 1.0)[0].sum().backward()
    assert (gradient(16) - w.grad).norm() / w.grad.norm() < 4e-3  # 2e-2 when the sum is in bf16
