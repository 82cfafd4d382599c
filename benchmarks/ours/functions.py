"""Single functions at size: log-probabilities, GAE, the machine's matrix products, one forward and backward pass."""

from __future__ import annotations

import ctypes
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import read_rows
from benchmarks.ours.ceilings import product_weights
from benchmarks.ours.job import Job
from upslope.algo import gae, token_logprobs
from upslope.kernels.allocator import keep_freed_memory
from upslope.models.decoder import DecoderConfig
from upslope.models.open import load_model
from upslope.text.examples import Example
from upslope.training.batches import micro_batches
from upslope.training.supervised import example_logprobs

MICRO_TOKENS = 2048  # the recipe's default


def logprobs(job: Job) -> dict[str, Any]:
    """Chosen-token log-probabilities, forward and backward, against the way that holds every logit, in alternation."""
    size = job.size
    torch.manual_seed(0)
    hidden_ND = torch.randn(size.logprob_tokens, size.logprob_width).to(job.device, job.dtype).requires_grad_()
    weight_VD = (0.05 * torch.randn(size.logprob_vocab, size.logprob_width)).to(job.device).requires_grad_()
    target_N = torch.randint(size.logprob_vocab, (size.logprob_tokens,)).to(job.device)

    def chunked() -> Tensor:
        return token_logprobs(hidden_ND, weight_VD, target_N)[0]

    def whole() -> Tensor:
        logits_NV = F.linear(hidden_ND, weight_VD.to(job.dtype)).float()
        return torch.log_softmax(logits_NV, -1).gather(1, target_N[:, None]).squeeze(1)

    def gradients(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward().mean(), (hidden_ND, weight_VD))

    ways = {"chunked": lambda: gradients(chunked), "whole": lambda: gradients(whole)}
    one, other = (way() for way in ways.values())
    error = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(one, other, strict=True))
    kept = sum(t.nbytes for t in one) / 1e9
    del one, other
    extra = {name: extra_gb(job, way, kept) for name, way in ways.items()}
    times = job.in_turn(ways, size.rounds)
    median = {name: statistics.median(found) for name, found in times.items()}
    return job.line(
        median["chunked"],
        "s",
        whole_s=median["whole"],
        speedup=median["whole"] / median["chunked"],
        extra_mb=None if extra["chunked"] is None else 1e3 * extra["chunked"],
        whole_extra_mb=None if extra["whole"] is None else 1e3 * extra["whole"],
        gradient_error=error,
        seconds=times,
        shape=[size.logprob_tokens, size.logprob_vocab, size.logprob_width],
    )


def extra_gb(job: Job, way: Callable[[], object], kept: float) -> float | None:
    """The most memory a call takes beyond what stood there and what it returns; None where the system cannot tell."""
    if job.device_name == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 1e9 - kept
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = resident("VmRSS")
    way()
    return resident("VmHWM") - before - kept


def resident(key: str) -> float:
    """A line of /proc/self/status in GB: VmRSS now, VmHWM at most."""
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(key):
            return int(row.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"/proc/self/status has no {key}")


def advantages(job: Job) -> dict[str, Any]:
    """GAE over many episodes of drawn lengths, in milliseconds."""
    size = job.size
    generator = torch.Generator().manual_seed(0)
    inner = torch.randperm(size.gae_tokens - 1, generator=generator)[: size.gae_episodes - 1] + 1
    starts = torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([size.gae_tokens])]).to(job.device)
    reward_A = torch.randn(size.gae_tokens, generator=generator).to(job.device)
    value_A = torch.randn(size.gae_tokens, generator=generator).to(job.device)
    seconds = job.median(lambda: gae(reward_A, value_A, starts, gamma=1.0, lam=0.95), 4 * size.rounds)
    longest = int((starts[1:] - starts[:-1]).max())
    return job.line(1e3 * seconds, "ms", tokens=size.gae_tokens, episodes=size.gae_episodes, longest=longest)


def matrix(job: Job) -> dict[str, Any]:
    """The machine's matrix product in GFLOP/s, in bf16 and fp32 in alternation; the best of several is its peak."""
    n = job.size.matrix
    made = {name: torch.randn(n, n).to(job.device) for name in ("fp32", "bf16")}
    made["bf16"] = made["bf16"].to(torch.bfloat16)
    times = job.in_turn({name: (lambda x=x: x @ x) for name, x in made.items()}, 4 * job.size.rounds)  # type: ignore[misc]
    peak = {name: 2 * n**3 / min(found) / 1e9 for name, found in times.items()}
    middle = {f"{name}_median": 2 * n**3 / statistics.median(found) / 1e9 for name, found in times.items()}
    return job.line(peak[job.dtype_name], "GFLOP/s", side=n, **peak, **middle)


def forward_backward(job: Job) -> dict[str, Any]:
    """One batch of the SFT rows, forwards and backwards without the optimizer: useful GFLOP/s.

    What is computed twice to save memory counts once.
    """
    keep_freed_memory()
    rows = read_rows(job.model, "sft")[: job.size.sft_batch]
    examples = [Example(row["ids"], [True] * len(row["ids"]), i) for i, row in enumerate(rows)]
    model = load_model(job.model)
    model.compute_dtype = job.dtype
    model.to(job.device)
    assert isinstance(model.config, DecoderConfig)
    lengths = [len(e.ids) for e in examples]

    def pass_over() -> None:
        for part in micro_batches(lengths, MICRO_TOKENS):
            (-example_logprobs(model, [examples[i] for i in part]).mean()).backward()
        model.zero_grad(set_to_none=False)

    seconds = job.median(pass_over, job.size.rounds)
    work = training_flops(model.config, lengths)
    tokens = sum(lengths)
    return job.line(work / seconds / 1e9, "GFLOP/s", tokens=tokens, tokens_per_s=tokens / seconds, gflop=work / 1e9)


def training_flops(config: DecoderConfig, lengths: list[int]) -> float:
    """FLOPs of a forward and backward pass: 6 for each weight of a product and token, and those of causal attention.

    Attention: scores and their mix of values, 2 products of heads * head_dim * (L + 1) / 2 a token, forwards once and
    backwards twice.
    """
    weights = product_weights(config)
    return sum(6.0 * weights * n + attention_flops(config, n) for n in lengths)


def attention_flops(config: DecoderConfig, length: int) -> float:
    """FLOPs of causal attention over one sequence, forwards and backwards."""
    return 6.0 * config.layers * config.heads * config.head_dim * length * (length + 1)
