"""The kernels for a GPU against torch's own operations: natively where there is a GPU, else in Triton's interpreter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import DEVICE, random
from upslope.algo.random import key_words, uniform
from upslope.kernels import gpu
from upslope.models.cache import DecoderCache, Entries
from upslope.models.ops import rotate

DTYPES = [torch.float32, torch.bfloat16]
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter's products know no bf16


def close(found, wanted, dtype=torch.float32):
    """Equal but for the rounding of a dtype."""
    near = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    torch.testing.assert_close(found.cpu().float(), wanted.cpu().float(), atol=near, rtol=near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 130])
def test_norms(gpu_kernels, dtype, width):
    x, y = (random(5, width, dtype=dtype, seed=s).to(gpu_kernels) for s in (1, 2))
    weight = random(width, seed=3).to(gpu_kernels)
    wide = x.double().requires_grad_()
    by = weight.double().requires_grad_()
    normed = F.rms_norm(wide, (width,), by, 1e-5)
    found, scale = gpu.norm(x, weight, 1e-5)
    close(found, normed.to(dtype), dtype)
    normed.backward(y.double())
    by_x, by_weight = gpu.norm_backward(x, y, weight, scale)
    close(by_x, wide.grad.to(dtype), dtype)
    close(by_weight, by.grad.float(), dtype)
    total = x + y
    close(
        gpu.add_norm(x, y, weight, 1e-5), F.rms_norm(total.double(), (width,), weight.double(), 1e-5).to(dtype), dtype
    )
    close(x, total, dtype)  # the sum stands in place of x


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(gpu_kernels, dtype):
    joined = random(3, 2 * 1030, dtype=dtype).to(gpu_kernels)
    gate, up = (t.double().requires_grad_() for t in joined.chunk(2, -1))
    close(gpu.swiglu_joined(joined), (F.silu(gate) * up).to(dtype), dtype)
    pull = random(3, 1030, dtype=dtype, seed=1).to(gpu_kernels)
    (F.silu(gate) * up).backward(pull.double())
    by_gate, by_up = gpu.swiglu_backward(*(t.contiguous() for t in joined.chunk(2, -1)), pull)
    close(by_gate, gate.grad.to(dtype), dtype)
    close(by_up, up.grad.to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_positions_there_and_back(gpu_kernels, dtype):
    joined = random(5, 6, 12, dtype=dtype).to(gpu_kernels)
    angle = random(5, 6, seed=1).to(gpu_kernels)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    some = joined[:, :3]  # rows with a gap between them
    turned = gpu.rotate(some, cos, sin)
    close(turned, rotate(some.double(), cos.double()[:, None], sin.double()[:, None]).to(dtype), dtype)
    close(gpu.rotate(turned, cos, sin, back=True), some.contiguous(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [37, 5000])  # one block of entries, and two
@pytest.mark.parametrize("pulls", [(True, True), (True, False), (False, True)])
def test_log_probabilities_and_their_gradient(gpu_kernels, dtype, vocabulary, pulls):
    logits = random(4, vocabulary, dtype=dtype, scale=3.0).to(gpu_kernels)
    logits[1, 3] = -1e3  # of no probability at all
    target = torch.tensor([0, 5, vocabulary - 1, 7], device=gpu_kernels)
    wide = logits.double().requires_grad_()
    log_p = torch.log_softmax(wide / 0.7, -1)
    logp = log_p.gather(1, target[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    found = gpu.token_stats(logits, target, 0.7)
    for value, wanted in zip(found, (logp, entropy, (wide / 0.7).logsumexp(-1)), strict=True):
        close(value, wanted.detach().float())
    grads = [random(4, seed=s).to(gpu_kernels) if there else None for s, there in enumerate(pulls)]
    sum((g.double() * x).sum() for g, x in zip(grads, (logp, entropy), strict=True) if g is not None).backward()
    gain = gpu.token_gradient_(logits.clone(), target, found[1], found[2], *grads, 0.7)
    close(gain, wide.grad.to(dtype), dtype)


def test_a_target_that_is_no_token_has_no_log_probability(gpu_kernels):
    logits = random(2, 9).to(gpu_kernels)
    assert gpu.token_stats(logits, torch.tensor([9, -1], device=gpu_kernels), 1.0)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("heads, kv_heads, width", [(6, 2, 8), (1, 1, 16)])
def test_a_decoding_step_is_attention_over_all_that_a_slot_holds(gpu_kernels, dtype, window, heads, kv_heads, width):
    """Against one softmax over everything; what a slot held behind its tokens is nan and is not read."""
    lengths, places = [3, 0, 70], 80
    angle = torch.arange(places)[:, None] * torch.tensor([0.3**i for i in range(width // 2)])
    rope = tuple(f(angle).to(gpu_kernels, dtype) for f in (torch.cos, torch.sin))
    cache = DecoderCache(1, 3, kv_heads, places, width, dtype=dtype, device=gpu_kernels)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    prompts = random(sum(lengths), heads + 2 * kv_heads, width, dtype=dtype).to(gpu_kernels)
    entries = Entries([(0, 3, 0), (3, 70, 2)], gpu_kernels)
    turns = torch.tensor([*range(3), *range(70)], device=gpu_kernels)
    cache.write(0, entries, prompts, tuple(t[turns] for t in rope), heads)
    new = random(3, heads + 2 * kv_heads, width, dtype=dtype, seed=1).to(gpu_kernels)
    held = torch.tensor(lengths, device=gpu_kernels)
    found = cache.attend(0, new.view(3, -1), rope, held, heads, window or None)
    for slot, (start, n) in enumerate(((0, 3), (3, 0), (3, 70))):
        rows = torch.cat((prompts[start : start + n], new[slot : slot + 1])).double()
        cos, sin = (t[: n + 1, None].double() for t in rope)
        q, k, v = rows.split([heads, kv_heads, kv_heads], dim=1)
        q, k = (rotate(x, cos, sin).to(dtype).double() for x in (q, k))
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("hd,thd->ht", q[-1], k) * width**-0.5
        if window:
            scores[:, : max(0, n + 1 - window)] = -float("inf")
        wanted = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
        close(found[slot], wanted.reshape(-1).to(dtype), dtype)


@pytest.mark.parametrize("vocabulary, valid", [(37, 30), (9000, 9000), (9000, 4096)])
def test_a_choice_is_that_of_the_cumulative_distribution_and_moves_the_row_on(gpu_kernels, vocabulary, valid):
    rows, room = 5, 8
    logits = random(rows, vocabulary, scale=3.0)
    temperature = torch.tensor([1.0, 0.6, 0.0, 1.4, 1.0])
    facts = torch.zeros(6, room, dtype=torch.int64)
    facts[1, :rows] = facts[2, :rows] = torch.tensor([3, 9, 4, 0, 7])
    keys, samples, first = np.array([1, 2, 3, 5 << 40, 2**33]), np.array([0, 1, 2, 3, 70]), 6
    facts[3, :rows], facts[4, :rows], facts[5, :rows] = torch.from_numpy(keys), torch.from_numpy(samples), first
    facts, key = facts.to(gpu_kernels), torch.tensor(key_words(77, 2**32 + 5), device=gpu_kernels)
    ids = torch.full((3, room), -1, device=gpu_kernels)
    logp = torch.zeros(3, room, device=gpu_kernels)
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None].double()
    log_p = torch.log_softmax(logits[:, :valid].double() / heat, -1)
    for step in range(3):
        gpu.choose_next(logits.to(gpu_kernels), temperature.to(gpu_kernels), facts, key, ids, logp, valid)
        drawn = torch.from_numpy(uniform(77, 2**32 + 5, keys, samples, first + step))
        wanted = (log_p.exp().cumsum(-1) <= drawn[:, None]).sum(-1)
        wanted[2] = logits[2, :valid].argmax()
        assert ids[step, :rows].tolist() == wanted.tolist()
        close(logp[step, :rows], log_p.gather(1, wanted[:, None]).squeeze(1).float())
        assert facts[0, :rows].tolist() == wanted.tolist() and facts[1, 0] == 4 + step
    assert (ids[:, rows:] == -1).all()
