"""A decoder's cache: compiled or not, it gives what attention over the whole sequence gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import random
from upslope.kernels import cpu
from upslope.models.cache import DecoderCache, Entries


def reference(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """One query (heads, d) over keys and values (n, kv heads, d)."""
    if window is not None:
        keys, values = keys[-window:], values[-window:]
    group = len(q) // keys.shape[1]
    k, v = (t.double().transpose(0, 1).repeat_interleave(group, 0) for t in (keys, values))
    return F.scaled_dot_product_attention(q.double()[:, None], k, v)[:, 0]


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("no C++ compiler here: torch's operations stand in")
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(2, 2, 32), (6, 2, 64), (7, 1, 96), (10, 2, 32)])
@pytest.mark.parametrize("window", [None, 5])
def test_steps_look_at_prompt_and_own_tokens(
    way: str, dtype: torch.dtype, heads: int, kv_heads: int, d: int, window: int | None
) -> None:
    lengths = [1, 40, 31]
    cache = DecoderCache(2, 3, kv_heads, 70, d, dtype=dtype, device=torch.device("cpu"))
    if way == "compiled":
        for held_before in (cache.keys, cache.values):  # what memory holds that was never written
            held_before.fill_(float("nan"))
    assert cache.compiled == (way == "compiled")
    held = []
    for slot, n in enumerate(lengths):
        qkv = random(n, heads + 2 * kv_heads, d, seed=10 * slot).to(dtype)
        cache.write(1, Entries([(0, n, slot)], cache.keys.device), qkv, None, heads)
        cache.length[slot] = n
        held.append(qkv[:, heads:].split(kv_heads, dim=1))
    for step in range(3):
        qkv = random(3, heads + 2 * kv_heads, d, seed=100 + step).to(dtype)
        found = cache.attend(1, qkv, None, torch.tensor(cache.length), heads, window)
        for slot in range(3):
            q, k, v = qkv[slot].split([heads, kv_heads, kv_heads])
            held[slot] = (torch.cat((held[slot][0], k[None])), torch.cat((held[slot][1], v[None])))
            expected = reference(q, *held[slot], window).reshape(-1)
            near = 1e-5 if dtype == torch.float32 else 0.03
            assert float((found[slot].double() - expected).abs().max()) < near
            cache.length[slot] += 1
        if step == 0:  # the last slot moves into the first one's place, and is alone from now on
            cache.move(2, 0)
            held[0] = held[2]
    if way == "torch":
        assert not cache.keys[0].any()  # the other layer has nothing


def test_both_ways_turn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler here: torch's operations stand in")
    found = []
    angle, before = random(2, 16, seed=3), random(7, 16, seed=4)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(cpu, "available", lambda: False)
        cache = DecoderCache(1, 2, 2, 40, 32, dtype=torch.float32, device=torch.device("cpu"))
        prompts = random(7, 8, 32, seed=5)  # of 3 and 4 tokens
        cache.write(0, Entries([(0, 3, 0), (3, 4, 1)], cache.keys.device), prompts, (before.cos(), before.sin()), 4)
        cache.length = [3, 4]
        for step in range(33):
            qkv = random(2, 8, 32, seed=step)
            last = cache.attend(0, qkv, (angle.cos(), angle.sin()), torch.tensor(cache.length), 4, None)
            cache.length = [n + 1 for n in cache.length]
        found.append(last)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
