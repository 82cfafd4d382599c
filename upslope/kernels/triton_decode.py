"""Kernels for a GPU that decode: attention over a cache, and the choice of a token. Called by gpu.py.

Everything that changes from step to step is read from the card's memory, so that a step can be recorded once and
played again.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    qkv, cos, sin, places, keys, values, length, out, heads, kv_heads, width, capacity, scale,
    WINDOW: tl.constexpr, ROPE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    slot, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(length + slot)
    group, half = heads // kv_heads, width // 2
    g, d = tl.arange(0, G)[:, None], tl.arange(0, D)[None, :]
    asked, real = (g < group) & (d < width), d < width
    line = qkv + slot * (heads + 2 * kv_heads) * width
    at_q, at_k = line + (kv * group + g) * width, line + (heads + kv) * width
    q = tl.load(at_q + d, mask=asked, other=0.0)
    k = tl.load(at_k + d, mask=real, other=0.0)
    v = tl.load(at_k + kv_heads * width + d, mask=real, other=0.0)
    if ROPE:
        turn = tl.minimum(n, places - 1) * half + d % half
        c = tl.load(cos + turn, mask=real, other=0.0).to(tl.float32)
        s = tl.load(sin + turn, mask=real, other=0.0).to(tl.float32) * tl.where(d < half, -1.0, 1.0)
        other = tl.where(d < half, d + half, d - half)
        q_other = tl.load(at_q + other, mask=asked, other=0.0).to(tl.float32)
        k_other = tl.load(at_k + other, mask=real, other=0.0).to(tl.float32)
        q = (q.to(tl.float32) * c + q_other * s).to(q.dtype)
        k = (k.to(tl.float32) * c + k_other * s).to(k.dtype)
    cell = (slot * kv_heads + kv) * capacity * width
    here = real & (n + d * 0 < capacity)
    tl.store(keys + cell + n * width + d, k, mask=here)
    tl.store(values + cell + n * width + d, v, mask=here)
    # the new token first: it stands in registers, and what was just stored is not read
    top = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
    total = tl.full((G,), 1.0, dtype=tl.float32)
    mixed = tl.zeros((G, D), dtype=tl.float32) + v.to(tl.float32)
    first = tl.maximum(0, n + 1 - WINDOW) if WINDOW > 0 else n * 0
    for start in range(first // K * K, n, K):
        t = start + tl.arange(0, K)
        seen = (t >= first) & (t < n)
        lines = t[:, None] * width + d
        key = tl.load(keys + cell + lines, mask=seen[:, None] & real, other=0.0)
        value = tl.load(values + cell + lines, mask=seen[:, None] & real, other=0.0)
        score = tl.dot(q, tl.trans(key), input_precision="ieee") * scale  # ieee: fp32 is not rounded to tf32
        score = tl.where(seen[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        fade = tl.exp(top - higher)
        p = tl.exp(score - higher[:, None])
        total = total * fade + tl.sum(p, 1)
        mixed = mixed * fade[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        top = higher
    place = out + (slot * heads + kv * group + g) * width + d
    tl.store(place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=asked)


@triton.jit
def block_sums(logits, temperature, tops, sums, highest, vocabulary, valid, blocks, W: tl.constexpr):
    """Of each block of a row: its highest entry and where it is, and the sum of e^z, z = (logit - highest) / T."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cold = tl.load(temperature + row)
    cold = tl.where(cold > 0, 1.0 / cold, 1.0)
    at = block * W + tl.arange(0, W)
    value = tl.load(logits + row * vocabulary + at, mask=at < valid, other=-float("inf")).to(tl.float32)
    top = tl.max(value, 0)
    e = tl.where(value == -float("inf"), 0.0, tl.exp((value - top) * cold))
    place = row * blocks + block
    tl.store(tops + place, top)
    tl.store(sums + place, tl.sum(e, 0))
    tl.store(highest + place, tl.min(tl.where(value == top, at, vocabulary), 0))


@triton.jit
def philox(prompt, sample, position, key0, key1):
    """The first two words of Philox4x32-10, as algo/random.py counts and keys it, as a number in [0, 1)."""
    c0 = (prompt & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((prompt >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2, c3 = sample.to(tl.uint32), position.to(tl.uint32)
    k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
    a, b = tl.full((), 0xD2511F53, tl.uint32), tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in range(10):
        high0, low0, high1, low1 = tl.umulhi(a, c0), a * c0, tl.umulhi(b, c2), b * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + tl.full((), 0x9E3779B9, tl.uint32), k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return ((c0 >> 5).to(tl.float64) * 67108864.0 + (c1 >> 6).to(tl.float64)) / 9007199254740992.0


@triton.jit
def choose(
    logits, temperature, tops, sums, highest, row_facts, key, ids, logp, vocabulary, valid, blocks, rows,
    W: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The token at which a row's cumulative distribution passes its number, and what the next step reads of it.

    row_facts (6, rows): the last token, tokens held, tokens held at first, prompt key, sample, first position; the
    first two are moved on. ids and logp (steps, rows).
    """
    row = tl.program_id(0).to(tl.int64)
    held = tl.load(row_facts + rows + row)
    step = held - tl.load(row_facts + 2 * rows + row)
    heat = tl.load(temperature + row)
    cold = tl.where(heat > 0, 1.0 / heat, 1.0)
    b = tl.arange(0, B)
    tops_B = tl.load(tops + row * blocks + b, mask=b < blocks, other=-float("inf"))
    top = tl.max(tops_B, 0)
    weight_B = tl.load(sums + row * blocks + b, mask=b < blocks, other=0.0)
    weight_B = tl.where(weight_B > 0, weight_B * tl.exp((tops_B - top) * cold), 0.0).to(tl.float64)
    until_B = tl.cumsum(weight_B, 0)
    total = tl.max(until_B, 0)
    position = tl.load(row_facts + 5 * rows + row) + step
    drawn = philox(
        tl.load(row_facts + 3 * rows + row),
        tl.load(row_facts + 4 * rows + row),
        position,
        tl.load(key),
        tl.load(key + 1),
    )
    goal = drawn * total
    block = tl.sum((until_B <= goal).to(tl.int32), 0)
    last = tl.max(tl.where(weight_B > 0, b, 0), 0)
    block = tl.minimum(block, last)
    before = tl.max(tl.where(b < block, until_B, 0.0), 0)
    at = block * W + tl.arange(0, W)
    value = tl.load(logits + row * vocabulary + at, mask=at < valid, other=-float("inf")).to(tl.float32)
    p = tl.where(value == -float("inf"), 0.0, tl.exp((value - top) * cold))
    passed = (before + tl.cumsum(p.to(tl.float64), 0) > goal) & (p > 0)
    found = tl.min(tl.where(passed, at, vocabulary), 0)
    found = tl.where(found < vocabulary, found, tl.max(tl.where(p > 0, at, 0), 0))
    first = tl.min(
        tl.where(tops_B == top, tl.load(highest + row * blocks + b, mask=b < blocks, other=0), vocabulary), 0
    )
    found = tl.where(heat > 0, found, first)
    found = tl.minimum(found, vocabulary - 1).to(tl.int64)  # a row of nan has no entry; its log-probability says so
    chosen = tl.load(logits + row * vocabulary + found).to(tl.float32)
    tl.store(ids + step * rows + row, found)
    tl.store(logp + step * rows + row, (chosen - top) * cold - tl.log(total).to(tl.float32))
    tl.store(row_facts + row, found)
    tl.store(row_facts + rows + row, held + 1)
