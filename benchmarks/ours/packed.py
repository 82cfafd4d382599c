"""Training on packed texts against the machine's matrix products: forward, backward and the optimizer's step."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours.ceilings import ceilings
from benchmarks.ours.decode import make_model
from benchmarks.ours.functions import training_flops
from benchmarks.ours.job import Job
from benchmarks.ours.profile import profile
from upslope.config import Optim
from upslope.kernels.allocator import keep_freed_memory
from upslope.models.decoder import Decoder
from upslope.text.examples import Example
from upslope.training.batches import micro_batches
from upslope.training.supervised import example_logprobs
from upslope.training.update import Stats, make_optimizer, never, optimizer_step


def texts(job: Job, vocab: int) -> list[Example]:
    """Drawn tokens in texts of drawn lengths, evenly between the two limits, for one optimizer step."""
    size = job.size
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < size.train_tokens:
        lengths.append(int(torch.randint(size.train_low, size.train_high + 1, (1,), generator=generator)))
    ids = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
    return [Example(text, [True] * len(text), i) for i, text in enumerate(ids)]


class Training:
    """A model, its optimizer, and one optimizer batch that is learned again and again."""

    def __init__(self, job: Job) -> None:
        keep_freed_memory()
        self.model: Decoder = make_model(job)
        self.examples = texts(job, self.model.config.vocab_size)
        self.lengths = [len(e.ids) for e in self.examples]
        self.optim = Optim(lr=1e-5)
        self.optimizer = make_optimizer(self.model, self.optim)

    @property
    def flops(self) -> float:
        """Useful ones of a step: what is computed twice to save memory counts once, the optimizer's not at all."""
        return training_flops(self.model.config, self.lengths)

    def loss_of(self, part: list[int]) -> tuple[Tensor, Stats]:
        logp_A = example_logprobs(self.model, [self.examples[i] for i in part])
        return -logp_A.sum() / sum(self.lengths), {}

    def passes(self, budget: int) -> None:
        """Forwards and backwards alone."""
        for part in micro_batches(self.lengths, budget):
            self.loss_of(part)[0].backward()
        self.model.zero_grad(set_to_none=True)

    def step(self, budget: int) -> None:
        """All of an optimizer step, as a stage makes it."""
        parts = micro_batches(self.lengths, budget)
        norm = self.optim.clip_norm
        optimizer_step(self.model, self.optimizer, parts, self.loss_of, lr=1e-5, clip_norm=norm, should_stop=never)


def packed(job: Job) -> dict[str, Any]:
    """Useful GFLOP/s of whole optimizer steps on ragged texts; in details, each size of micro-batch, and its passes.

    A size that does not fit the memory is left out, and said to be.
    """
    rate = ceilings(job).flops
    training = Training(job)
    found: dict[str, dict[str, float]] = {}
    for budget in job.size.train_micro:
        try:
            ways = {"step": lambda b=budget: training.step(b), "passes": lambda b=budget: training.passes(b)}  # type: ignore[misc]
            times = job.in_turn(ways, job.size.rounds)
        except torch.OutOfMemoryError:
            training.model.zero_grad(set_to_none=True)
            continue
        found[str(budget)] = {name: statistics.median(all_times) for name, all_times in times.items()}
    best = min(found, key=lambda budget: found[budget]["step"])
    step, passes = found[best]["step"], found[best]["passes"]
    tokens = sum(training.lengths)
    return job.line(
        training.flops / step / 1e9,
        "GFLOP/s",
        share=training.flops / step / rate,
        passes_share=training.flops / passes / rate,
        tokens_per_s=tokens / step,
        micro_tokens=int(best),
        seconds=found,
        without_room=[budget for budget in job.size.train_micro if str(budget) not in found],
        tokens=tokens,
        texts=len(training.lengths),
    )


def profile_training(job: Job) -> dict[str, Any]:
    """Where the time of an optimizer step goes, by kernel: milliseconds of the step and of the device's work."""
    training = Training(job)
    budget = job.size.train_micro[0]
    training.step(budget)
    found = profile(job, lambda: training.step(budget))
    return job.line(1e3 * found.seconds, "ms", busy_ms=1e3 * found.busy, table=found.table(), micro_tokens=budget)
