"""Decoding against what the machine could do: tokens/s, where a step's time goes, and the sampler's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.models import model_on
from benchmarks.ours.ceilings import ceilings, decoding_floor
from benchmarks.ours.job import Job
from benchmarks.ours.profile import Profile, profile
from upslope.algo.random import uniform
from upslope.engine import Completion, Engine, Request, Sampling
from upslope.kernels.allocator import keep_freed_memory
from upslope.models.decoder import Decoder
from upslope.models.open import make_runner
from upslope.text.examples import Example
from upslope.training.batches import micro_batches
from upslope.training.supervised import example_logprobs

FEW, MANY = 0, 1  # which of Size.decode_rows


def make_model(job: Job) -> Decoder:
    """Random weights of the shape that the job's model folder is named after."""
    model = model_on(job.size.models[job.model.name], job.device)
    model.compute_dtype = job.dtype
    return model


def make_engine(job: Job, model: Decoder, slots: int) -> Engine:
    keep_freed_memory()
    engine = Engine(make_runner(model, dtype=job.dtype), eos_id=(), slots=slots, seed=0)
    engine.load(model, version=1)
    return engine


def requests(job: Job, vocab: int, count: int, tokens: int) -> list[Request]:
    """Prompts of drawn tokens, one completion of `tokens` each."""
    places = torch.arange(job.size.prompt).numpy()
    ids = [(uniform(0, 0, i, 0, places) * vocab).astype(int).tolist() for i in range(count)]
    return [Request(tuple(prompt), i, Sampling(tokens)) for i, prompt in enumerate(ids)]


def decode(which: int) -> Callable[[Job], dict[str, Any]]:
    """A program: tokens/s of so many rows, and which share that is of the floor of its steps.

    A step's time is that of long completions less that of short ones, over the steps between: what the engine does
    beside the model is in it, the prompts are not.
    """

    def program(job: Job) -> dict[str, Any]:
        size, rows = job.size, job.size.decode_rows[which]
        model = make_model(job)
        engine = make_engine(job, model, rows)
        vocab = model.config.vocab_size
        asked = {str(n): requests(job, vocab, rows, n) for n in size.decode_tokens}
        ways = {name: (lambda a=a: engine.generate(a, step=0)) for name, a in asked.items()}  # type: ignore[misc]
        times = job.in_turn(ways, size.rounds)
        short, long = (statistics.median(found) for found in times.values())
        steps = size.decode_tokens[1] - size.decode_tokens[0]
        held = size.prompt + sum(size.decode_tokens) / 2
        floor = decoding_floor(model.config, rows, held, job.dtype.itemsize, ceilings(job))
        seconds = (long - short) / steps
        return job.line(
            rows / seconds,
            "tokens/s",
            rows=rows,
            step_s=seconds,
            share=floor["floor_s"] / seconds,
            floor_tokens_per_s=rows / floor["floor_s"],
            with_prompts_tokens_per_s=rows * size.decode_tokens[1] / long,
            seconds=times,
            **floor,
        )

    return program


def profile_decode(job: Job) -> dict[str, Any]:
    """Where a decoding step's time goes, by kernel: many rows; milliseconds of a step and the device's busy share."""
    rows, short = job.size.decode_rows[MANY], job.size.decode_tokens[0]
    model = make_model(job)
    engine = make_engine(job, model, rows)
    asked = {n: requests(job, model.config.vocab_size, rows, n) for n in (short, 2 * short - 1)}
    found: dict[int, Profile] = {}
    for count, some in asked.items():
        engine.generate(some, step=0)
        found[count] = profile(job, lambda some=some: engine.generate(some, step=0))  # type: ignore[misc]
    step = found[2 * short - 1].less(found[short], short - 1)
    return job.line(1e3 * step.seconds, "ms", rows=rows, busy_ms=1e3 * step.busy, table=step.table())


def gap(job: Job) -> dict[str, Any]:
    """By how much the sampler's log-probabilities differ from the trainer's: the mean, in nats, and the largest."""
    rows, tokens = job.size.decode_rows[FEW], job.size.completion
    model = make_model(job)
    asked = requests(job, model.config.vocab_size, rows, tokens)
    done = make_engine(job, model, rows).generate(asked, step=0)
    sampled = torch.tensor([c.logp for c in done], dtype=torch.float64)
    found = {}
    for name, dtype in (("trainer", job.dtype), ("fp32", torch.float32)):
        model.compute_dtype = dtype
        found[name] = (sampled - trained_logprobs(job, model, asked, done)).abs()
    return job.line(
        float(found["trainer"].mean()),
        "nats",
        largest=float(found["trainer"].max()),
        fp32_mean=float(found["fp32"].mean()),
        fp32_largest=float(found["fp32"].max()),
        tokens=sampled.numel(),
        mean_logp=float(sampled.mean()),
    )


@torch.no_grad()
def trained_logprobs(job: Job, model: Decoder, asked: list[Request], done: list[Completion]) -> torch.Tensor:
    """The trainer's log-probabilities of what was sampled: a row for each completion, all of one length."""
    texts = [[*request.prompt_ids, *c.ids] for request, c in zip(asked, done, strict=True)]
    prompt = job.size.prompt
    examples = [Example(ids, [i >= prompt for i in range(len(ids))], n) for n, ids in enumerate(texts)]
    logp = torch.empty(len(done), job.size.completion, dtype=torch.float64)
    for part in micro_batches([len(ids) for ids in texts], job.size.train_micro[0]):
        found = example_logprobs(model, [examples[i] for i in part])
        logp[part] = found.double().cpu().view(len(part), -1)
    return logp
