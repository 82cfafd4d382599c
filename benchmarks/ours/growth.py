"""How time grows: generation with the number of samples, training with the length of a sequence."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.ours.functions import attention_flops, training_flops
from benchmarks.ours.generate import make_engine, requests, run
from benchmarks.ours.job import Job
from upslope.models.decoder import DecoderConfig
from upslope.models.open import load_model
from upslope.text.examples import Example
from upslope.training.supervised import example_logprobs


def growth(job: Job) -> dict[str, Any]:
    """Time of twice the samples over time of the samples; in details, training time per token at several lengths."""
    ratio, samples = with_samples(job)
    lengths = with_length(job)
    return job.line(ratio, "x", samples=samples, lengths=lengths, length_excess=max(x["excess"] for x in lengths))


def with_samples(job: Job) -> tuple[float, dict[str, Any]]:
    """Generation of as many samples as there are slots, and of twice as many, in alternation."""
    size = job.size
    engine = make_engine(job)
    asked = {n: requests(job, [size.completion] * n) for n in (size.slots, 2 * size.slots)}
    times = job.in_turn({str(n): (lambda r=r: run(engine, r)) for n, r in asked.items()}, 3)  # type: ignore[misc]
    small, large = (statistics.median(found) for found in times.values())
    return large / small, times


def with_length(job: Job) -> list[dict[str, float]]:
    """Forward and backward over equally many tokens in ever fewer, longer sequences, in alternation.

    excess: by how much a token costs more than at the first length, beyond what the FLOPs of attention account for.
    """
    size = job.size
    model = load_model(job.model)
    model.compute_dtype = job.dtype
    model.to(job.device)
    config = model.config
    assert isinstance(config, DecoderConfig)

    def train(length: int) -> None:
        ids = torch.randint(3, config.vocab_size, (size.growth_tokens,), generator=torch.Generator().manual_seed(0))
        examples = [Example(row.tolist(), [True] * length, i) for i, row in enumerate(ids.view(-1, length))]
        (-example_logprobs(model, examples).mean()).backward()
        model.zero_grad(set_to_none=False)

    times = job.in_turn({str(n): (lambda n=n: train(n)) for n in size.growth_lengths}, size.rounds)  # type: ignore[misc]
    found = []
    for length in size.growth_lengths:
        count = size.growth_tokens // length
        seconds = statistics.median(times[str(length)]) / size.growth_tokens
        flops = training_flops(config, [length] * count) / size.growth_tokens
        attention = count * attention_flops(config, length) / size.growth_tokens / flops
        found.append({"length": length, "us_per_token": 1e6 * seconds, "flop": flops, "attention_share": attention})
    first = found[0]
    for entry in found:
        grown, due = entry["us_per_token"] / first["us_per_token"], entry["flop"] / first["flop"]
        entry["excess"] = grown / due - 1
    return found
