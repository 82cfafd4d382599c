"""Attention over ragged batches: the compiled way, the composed one, and attention sequence by sequence agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import DEVICE, random
from upslope.kernels import cpu
from upslope.models import attention
from upslope.models.attention import Layout, attend
from upslope.models.ops import rotate
from upslope.ragged import Ragged

BATCHES = {
    "alone": ([5], [-1]),
    "uneven": ([3, 1, 7, 2], [-1, -1, -1, -1]),
    "shared prompt": ([4, 3, 6, 1], [-1, 0, 0, 0]),
    "two prompts and one alone": ([2, 5, 3, 4, 2], [-1, 0, -1, 2, -1]),
    "a child without tokens": ([4, 0, 2], [-1, 0, 0]),
}
CPU = torch.device("cpu")


def batch_of(name: str) -> Ragged:
    lengths, parents = BATCHES[name]
    return Ragged.of([[1] * n for n in lengths], parents)


def one_by_one(batch: Ragged, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Each sequence by itself, in fp64, its parent's tokens in front."""
    out = []
    group = q.shape[1] // k.shape[1]
    for b, parent in enumerate(batch.parent):
        own = list(range(batch.starts[b], batch.starts[b + 1]))
        before = list(range(batch.starts[parent], batch.starts[parent + 1])) if parent >= 0 else []
        places = torch.tensor([*before, *own], dtype=torch.int64)
        query = torch.arange(len(before), len(places))[:, None]
        key = torch.arange(len(places))[None]
        allowed = (key <= query) if window is None else (key <= query) & (key > query - window)
        queries = q[torch.tensor(own, dtype=torch.int64)].transpose(0, 1).double()
        keys, values = (t[places].transpose(0, 1).repeat_interleave(group, 0).double() for t in (k, v))
        out.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(params=["compiled", "in blocks", "composed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "composed":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("no C++ compiler here: torch's operations stand in")
    if request.param == "in blocks":
        monkeypatch.setattr(attention, "KEPT_KEYS", 0)
        monkeypatch.setattr(attention, "QUERIES", 2)
    return str(request.param)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("turned", [True, False])
def test_values_and_gradients(way: str, name: str, window: int | None, turned: bool) -> None:
    batch = batch_of(name)
    n = batch.tokens
    leaves = [random(n, h, 8, seed=i).requires_grad_() for i, h in enumerate((4, 2, 2))]
    angle = random(n, 1, 4, seed=9)
    rope = (angle.cos(), angle.sin()) if turned else None
    found = attend(*leaves, Layout(batch, CPU, window), rope)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    q, k = (rotate(x, angle.cos().double(), angle.sin().double()) if turned else x for x in wide[:2])
    expected = one_by_one(batch, q, k, wide[2], window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    pull = random(n, 4, 8, seed=5)
    found.backward(pull)
    expected.backward(pull.double())
    for ours, theirs in zip(leaves, wide, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_the_compiled_way(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler here: torch's operations stand in")
    batch = batch_of("shared prompt")
    leaves = [random(batch.tokens, h, 4, seed=i).requires_grad_() for i, h in enumerate((2, 1, 1))]

    def curvature() -> tuple[Tensor, ...]:
        out = attend(*leaves, Layout(batch, CPU, None))
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    compiled = curvature()
    monkeypatch.setattr(cpu, "available", lambda: False)
    for ours, theirs in zip(compiled, curvature(), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()  # single numbers are small differences of large ones


@pytest.mark.parametrize("window", [None, 200])
def test_long_sequences_in_bf16_are_near_the_fused_way(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler here: torch's operations stand in")
    batch = Ragged.of([[1] * 600, [1] * 30, [1] * 300], [-1, 0, -1])
    leaves = [random(batch.tokens, h, 16, seed=i).bfloat16().requires_grad_() for i, h in enumerate((4, 2, 2))]
    assert len(Layout(batch, CPU, window).blocks) == 3

    def result() -> tuple[Tensor, ...]:
        out = attend(*leaves, Layout(batch, CPU, window))
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    compiled = result()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = one_by_one(batch, *exact, window)
    expected = (out, *torch.autograd.grad(out.square().sum(), exact))
    monkeypatch.setattr(cpu, "available", lambda: False)
    fused = result()

    def error(x: Tensor, y: Tensor) -> float:
        return float((x.detach().double() - y.detach()).norm() / y.detach().norm())

    for ours, theirs, wide in zip(compiled, fused, expected, strict=True):
        assert error(ours, wide) < 0.015 and error(theirs, wide) < 0.015  # scores are rounded before the softmax


@pytest.mark.parametrize("name", BATCHES)
def test_keys_end_to_end_are_a_parents_and_then_the_sequences_own(name: str) -> None:
    batch = batch_of(name)
    layout = Layout(batch, CPU, None)
    queries, keys = layout.cumulative
    places = torch.arange(batch.tokens)
    source = places if layout.key_source is None else layout.key_source
    assert queries.tolist() == list(batch.starts) and keys[-1] == len(source)
    for b, (start, end) in enumerate(zip(keys.tolist(), keys.tolist()[1:], strict=False)):
        parent = batch.parent[b]
        own = places[batch.starts[b] : batch.starts[b + 1]].tolist()
        before = places[batch.starts[parent] : batch.starts[parent + 1]].tolist() if parent >= 0 else []
        assert source[start:end].tolist() == before + own


@pytest.mark.skipif(DEVICE.type == "cpu", reason="FlashAttention needs a GPU")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_unpadded_attention_on_a_gpu_is_the_padded_one(name: str, window: int | None) -> None:
    """Outputs, gradients and gradients of gradients in bf16, against fp32, which is padded."""
    batch = batch_of(name)
    layout = Layout(batch, DEVICE, window)
    q, k, v = (random(batch.tokens, heads, 16, seed=seed).to(DEVICE) for seed, heads in ((1, 6), (2, 2), (3, 2)))
    angle = random(batch.tokens, 1, 8, seed=9).to(DEVICE)
    pull = random(batch.tokens, 6, 16, seed=4).to(DEVICE)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        rope = (angle.cos().to(dtype), angle.sin().to(dtype))
        out = attend(leaves[0], leaves[1], leaves[2], layout, rope)
        plain = torch.autograd.grad(out, leaves, pull.to(dtype), retain_graph=True)
        first = torch.autograd.grad(out, leaves, pull.to(dtype), create_graph=True)
        second = torch.autograd.grad(first[0].float().square().sum(), leaves[1])
        found.append([x.detach().float() for x in (out, *plain, *first, *second)])
    apart = [float((low - exact).norm() / (exact.norm() + 1e-2)) for low, exact in zip(*found, strict=True)]
    assert max(apart[:7]) < 0.03 and apart[7] < 0.15, apart
