"""Generation by the engine: all of one length, lengths spread wide, and its matrix products alone."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import read_rows
from benchmarks.ours.job import Job
from upslope.engine import Engine, Request, Sampling
from upslope.kernels.allocator import keep_freed_memory
from upslope.kernels.products import Product
from upslope.models.decoder import DecoderConfig
from upslope.models.open import load_model, make_runner


def make_engine(job: Job) -> Engine:
    """An engine with the model's weights, which no token ends."""
    keep_freed_memory()  # as every run does
    model = load_model(job.model).requires_grad_(False)
    model.compute_dtype = job.dtype
    model.to(job.device)
    engine = Engine(make_runner(model, dtype=job.dtype), eos_id=(), slots=job.size.slots, seed=0)
    engine.load(model, version=1)
    return engine


def requests(job: Job, limits: Sequence[int]) -> list[Request]:
    """A prompt for each limit of new tokens."""
    rows = read_rows(job.model, "prompts")
    return [Request(tuple(rows[i % len(rows)]["ids"]), i, Sampling(limit)) for i, limit in enumerate(limits)]


def run(engine: Engine, asked: Sequence[Request]) -> int:
    """Tokens that came; each has its log-probability. Raises AssertionError for one too many or too few."""
    done = engine.generate(asked, step=0)
    tokens = sum(len(c.ids) for c in done)
    assert tokens == sum(r.sampling.max_tokens for r in asked) == sum(len(c.logp) for c in done)
    return tokens


def generate(job: Job) -> dict[str, Any]:
    """Prompts of one length, completions of one length, all side by side."""
    size = job.size
    engine = make_engine(job)
    run(engine, requests(job, [size.warm_tokens] * size.slots))
    asked = requests(job, [size.completion] * size.slots)
    seconds = job.seconds(lambda: run(engine, asked))
    tokens = size.slots * size.completion
    return job.line(tokens / seconds, "tokens/s", seconds=seconds, tokens=tokens, prompt_tokens=size.prompt)


def ragged(job: Job) -> dict[str, Any]:
    """Completion limits spread evenly, in a drawn order, against as many tokens in completions of one length."""
    size = job.size
    count, low, high = size.ragged_requests, size.ragged_low, size.ragged_high
    limits = [low + round(i * (high - low) / (count - 1)) for i in range(count)]
    random.Random(0).shuffle(limits)
    total = sum(limits)
    even = [total // count + (i < total % count) for i in range(count)]
    engine = make_engine(job)
    run(engine, requests(job, [size.warm_tokens] * size.slots))
    spread, same = requests(job, limits), requests(job, even)
    times: dict[str, list[float]] = {"uniform": [], "ragged": []}
    for _ in range(2):
        times["uniform"].append(job.seconds(lambda: run(engine, same)))
        times["ragged"].append(job.seconds(lambda: run(engine, spread)))
    speed = {name: total / statistics.median(found) for name, found in times.items()}
    return job.line(
        speed["ragged"],
        "tokens/s",
        uniform=speed["uniform"],
        ratio=speed["ragged"] / speed["uniform"],
        tokens=total,
        requests=count,
        slots=size.slots,
        lengths=[low, high],
        seconds=times,
    )


def gemm_bound(job: Job) -> dict[str, Any]:
    """Tokens/s of the products of a decoding step, as if nothing stood between them; the faster of two layouts."""
    config = load_model(job.model).config
    assert isinstance(config, DecoderConfig)
    rows = job.size.slots
    weights = [w.to(job.device) for w in layer_weights(config, job.dtype)]
    head = torch.randn(config.vocab_size, config.width).to(job.device, job.dtype)
    inputs = [torch.randn(rows, w.shape[1]).to(job.device, job.dtype) for w in [*weights, head]]

    def plain() -> None:
        for _ in range(config.layers):
            for x, w in zip(inputs, weights, strict=False):
                F.linear(x, w)
        F.linear(inputs[-1], head)

    products = [Product(w, dtype=job.dtype) for w in [*weights, head]]

    def laid_out() -> None:
        for _ in range(config.layers):
            for x, product in zip(inputs, products[:-1], strict=False):
                product(x)
        products[-1](inputs[-1])

    with torch.inference_mode():
        times = job.in_turn({"plain": plain, products[0].layout: laid_out}, 10 * job.size.rounds)
    speed = {name: rows / statistics.median(found) for name, found in times.items()}
    return job.line(max(speed.values()), "tokens/s", rows=rows, **speed)


def layer_weights(config: DecoderConfig, dtype: torch.dtype) -> list[Tensor]:
    """Random weights of one layer's four products: q, k and v; o; gate and up; down."""
    inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = [
        (inner + 2 * kv, config.width),
        (config.width, inner),
        (2 * config.ffn_width, config.width),
        (config.width, config.ffn_width),
    ]
    return [torch.randn(shape).to(dtype) for shape in shapes]
