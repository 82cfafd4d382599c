"""Kernels for a GPU that go over rows: norms, SwiGLU, rotary positions, log-probabilities. Called by gpu.py.

Sums are in fp32, a row is computed by one program in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm(x, y, weight, out, scale, width, eps, ADDS: tl.constexpr, KEEPS: tl.constexpr, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, W)
    real = at < width
    value = tl.load(x + row * width + at, mask=real, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(y + row * width + at, mask=real, other=0.0).to(tl.float32)
        kept = value.to(x.dtype.element_ty)
        tl.store(x + row * width + at, kept, mask=real)
        value = kept.to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    by = tl.load(weight + at, mask=real, other=0.0)
    tl.store(out + row * width + at, (value * root * by).to(out.dtype.element_ty), mask=real)
    if KEEPS:
        tl.store(scale + row, root)


@triton.jit
def norm_backward(x, grad, weight, scale, out, parts, rows, width, step, W: tl.constexpr):
    first = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, W)
    real = at < width
    by = tl.load(weight + at, mask=real, other=0.0)
    total = tl.zeros((W,), dtype=tl.float32)
    for row in range(first, rows, step):
        root = tl.load(scale + row)
        pull = tl.load(grad + row * width + at, mask=real, other=0.0).to(tl.float32)
        normal = tl.load(x + row * width + at, mask=real, other=0.0).to(tl.float32) * root
        total += pull * normal
        pull *= by
        share = tl.sum(pull * normal, 0) / width
        tl.store(out + row * width + at, ((pull - normal * share) * root).to(out.dtype.element_ty), mask=real)
    tl.store(parts + first * width + at, total, mask=real)


@triton.jit
def swiglu(gate, up, out, width, stride, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * W + tl.arange(0, W)
    real = at < width
    g = tl.load(gate + row * stride + at, mask=real, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=real)


@triton.jit
def swiglu_backward(gate, up, grad, by_gate, by_up, numbers, W: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    real = at < numbers
    g = tl.load(gate + at, mask=real, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=real, other=0.0).to(tl.float32)
    pull = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
    slope = 1.0 / (1.0 + tl.exp(-g))
    found = pull * u * slope * (1.0 + g * (1.0 - slope))
    tl.store(by_gate + at, found.to(by_gate.dtype.element_ty), mask=real)
    tl.store(by_up + at, (pull * g * slope).to(by_up.dtype.element_ty), mask=real)


@triton.jit
def rotate(x, cos, sin, out, stride, heads, half, sign, H: tl.constexpr, W: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, H)[:, None]
    at = tl.arange(0, W)[None, :]
    real = (head < heads) & (at < half)
    place = x + token * stride + head * 2 * half + at
    a = tl.load(place, mask=real, other=0.0).to(tl.float32)
    b = tl.load(place + half, mask=real, other=0.0).to(tl.float32)
    c = tl.load(cos + token * half + at, mask=at < half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * half + at, mask=at < half, other=0.0).to(tl.float32) * sign
    place = out + (token * heads + head) * 2 * half + at
    tl.store(place, (a * c - b * s).to(out.dtype.element_ty), mask=real)
    tl.store(place + half, (b * c + a * s).to(out.dtype.element_ty), mask=real)


@triton.jit
def token_stats(logits, target, logp, entropy, norm, vocabulary, cold, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * vocabulary
    top = -float("inf")
    total = 0.0  # sum of e^z and of z e^z, z = (logit - top) / temperature, for the highest entry so far
    weighted = 0.0
    for start in range(0, vocabulary, W):
        at = start + tl.arange(0, W)
        value = tl.load(line + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(value, 0))
        if higher > top:
            step = tl.where(top == -float("inf"), 0.0, (top - higher) * cold)
            fade = tl.exp(step)
            weighted = fade * (weighted + step * total)
            total = fade * total
            top = higher
        z = (value - top) * cold
        e = tl.exp(z)
        total += tl.sum(e, 0)
        weighted += tl.sum(tl.where(z < -87.0, 0.0, e * z), 0)  # 0 times -inf
    log_sum = tl.log(total)
    wanted = tl.load(target + row)
    known = (wanted >= 0) & (wanted < vocabulary)
    chosen = tl.load(line + wanted, mask=known, other=float("nan")).to(tl.float32)
    tl.store(logp + row, (chosen - top) * cold - log_sum)
    tl.store(entropy + row, log_sum - weighted / total)
    tl.store(norm + row, top * cold + log_sum)


@triton.jit
def token_gradient(
    logits, target, entropy, norm, by_logp, by_entropy, vocabulary, first, cold,
    LOGP: tl.constexpr, ENTROPY: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * W + tl.arange(0, W)
    real = at < vocabulary
    place = logits + row * vocabulary + at
    log_p = tl.load(place, mask=real, other=-float("inf")).to(tl.float32) * cold - tl.load(norm + row)
    pull = tl.zeros((W,), dtype=tl.float32)
    own = 0.0
    if LOGP:
        own = tl.load(by_logp + row)
        pull += own
    if ENTROPY:
        lift = tl.load(by_entropy + row) * (log_p + tl.load(entropy + row))
        pull += tl.where(log_p < -87.0, 0.0, lift)
    gain = -tl.exp(log_p) * pull + tl.where(at + first == tl.load(target + row), own, 0.0)
    tl.store(place, (gain * cold).to(logits.dtype.element_ty), mask=real)
