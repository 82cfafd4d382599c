"""Each compiled kernel against what torch computes in fp64 or composes in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import random
from upslope.engine.sampling import choose, log_distribution
from upslope.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here: torch's operations stand in")
DTYPES = [torch.float32, torch.bfloat16]
NEAR = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative to the largest number


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    wide = expected.detach().double()
    assert float((found.double() - wide).abs().max()) <= NEAR[dtype] * max(1.0, float(wide.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 64, 100])
def test_norm_and_its_gradient(dtype: torch.dtype, width: int) -> None:
    x, weight, grad = random(33, width, dtype=dtype), random(width, seed=1), random(33, width, dtype=dtype, seed=2)
    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.rms_norm(wide, (width,), wide_weight, 1e-5)
    expected.backward(grad.double())
    found, scale = cpu.norm(x, weight, 1e-5)
    close(found, expected, dtype)
    assert wide.grad is not None and wide_weight.grad is not None
    grad_x, grad_weight = cpu.norm_backward(x, grad, weight, scale)
    close(grad_x, wide.grad, dtype)
    close(grad_weight, wide_weight.grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_adds_in_place(dtype: torch.dtype) -> None:
    x, y, weight = random(5, 64, dtype=dtype), random(5, 64, dtype=dtype, seed=1), random(64, seed=2)
    total = x + y
    found = cpu.add_norm(x, y, weight, 1e-6)
    assert torch.equal(x, total)
    close(found, F.rms_norm(total.double(), (64,), weight.double(), 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    joined = random(9, 74, dtype=dtype, scale=4.0)
    joined[0, 0], joined[1, 0] = -200.0, 200.0  # where e^x would leave the range
    gate, up = joined.chunk(2, dim=1)
    grad = random(9, 37, dtype=dtype, seed=3)
    wide_gate, wide_up = gate.double().requires_grad_(), up.double().requires_grad_()
    expected = F.silu(wide_gate) * wide_up
    expected.backward(grad.double())
    close(cpu.swiglu(gate, up), expected, dtype)
    assert torch.equal(cpu.swiglu_joined(joined), cpu.swiglu(gate, up))
    assert wide_gate.grad is not None and wide_up.grad is not None
    grad_gate, grad_up = cpu.swiglu_backward(gate.contiguous(), up.contiguous(), grad)
    close(grad_gate, wide_gate.grad, dtype)
    close(grad_up, wide_up.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_statistics_and_gradient(dtype: torch.dtype, temperature: float) -> None:
    logits = random(6, 301, dtype=dtype, scale=5.0)
    logits[0, 5] = -1e4  # a token that cannot be
    logits[1, 7] = 300.0  # one that is certain
    target = torch.tensor([0, 7, 300, 3, 150, 9])
    pull_logp, pull_entropy = random(6, seed=1), random(6, seed=2)
    wide = logits.double().requires_grad_()
    logp = torch.log_softmax(wide / temperature, -1)
    entropy = -torch.where(logp > -1e300, logp.exp() * logp, 0.0).sum(-1)
    chosen = logp.gather(1, target[:, None]).squeeze(1)
    (chosen * pull_logp + entropy * pull_entropy).sum().backward()
    found = cpu.token_stats(logits, target, temperature)
    close(found[0], chosen, torch.float32)
    close(found[1], entropy, torch.float32)
    close(found[2], torch.logsumexp(wide / temperature, -1), torch.float32)
    gradient = cpu.token_gradient_(logits.clone(), target, found[1], found[2], pull_logp, pull_entropy, temperature)
    assert wide.grad is not None
    close(gradient, wide.grad, dtype)
    logits[0, 5] = float("-inf")
    assert all(torch.equal(a, b) for a, b in zip(found, cpu.token_stats(logits, target, temperature), strict=True))
    known = (target, found[1], found[2], pull_logp, pull_entropy)
    assert torch.equal(gradient, cpu.token_gradient_(logits.clone(), *known, temperature))


def test_nan_in_logits_is_seen() -> None:
    logits = random(2, 40)
    logits[1, 3] = float("nan")
    logp, entropy, _ = cpu.token_stats(logits, torch.tensor([1, 1]), 1.0)
    assert logp[0].isfinite() and entropy[0].isfinite()
    assert logp[1].isnan() and entropy[1].isnan()
    _, drawn = cpu.choose(logits, torch.ones(2), torch.full((2,), 0.5, dtype=torch.float64), 40)
    assert drawn[0].isfinite() and drawn[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_choose_is_the_inverse_of_the_cumulative_distribution(dtype: torch.dtype) -> None:
    rows, vocabulary, valid = 64, 1000, 990
    logits = random(rows, vocabulary, dtype=dtype, scale=3.0)
    temperature = torch.full((rows,), 0.8)
    temperature[:4] = 0.0
    uniform = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    uniform[4], uniform[5] = 0.0, 1.0 - 2**-53
    ids, logp = cpu.choose(logits, temperature, uniform, valid)
    dist = log_distribution(logits.clone(), temperature, [0] * rows, [1.0] * rows, valid)
    other, other_logp = choose(dist, uniform, temperature == 0)
    assert torch.equal(ids, other)
    close(logp, other_logp, torch.float32)
    assert torch.equal(ids[:4], logits[:4, :valid].float().argmax(1))


def test_choose_never_takes_what_cannot_be() -> None:
    logits = torch.full((3, 600), float("-inf"))
    logits[:, 299], logits[:, 301] = 0.0, 0.0
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    ids, logp = cpu.choose(logits, torch.ones(3), uniform, 600)
    assert ids.tolist() == [299, 301, 301]
    close(logp, torch.full((3,), 0.5).log(), torch.float32)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    x, grad, weight = random(200, 48), random(200, 48, seed=1), random(48, seed=2)
    whole = cpu.norm_backward(x, grad, weight, cpu.norm(x, weight, 1e-5)[1])
    try:
        torch.set_num_threads(threads)
        again = cpu.norm_backward(x, grad, weight, cpu.norm(x, weight, 1e-5)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_what_the_kernels_do_not_serve() -> None:
    assert cpu.serve(torch.zeros(2), torch.zeros(3))
    assert not cpu.serve(torch.zeros(2, dtype=torch.float64))
    assert not cpu.serve(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    assert not cpu.serve(torch.zeros(2, device="meta"))
