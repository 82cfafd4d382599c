"""What the machine itself can do, measured: bytes moved, products of matrices. Floors are made of these."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours.job import Job
from benchmarks.sizes import SIZES
from upslope.models.decoder import DecoderConfig


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second (the better of copying and reading), and FLOPs a second of a product in the job's dtype."""

    copied: float
    read: float
    flops: float

    @property
    def bytes(self) -> float:
        return max(self.copied, self.read)

    def seconds(self, moved: float, work: float) -> float:
        """The least time in which so many bytes and FLOPs can be done: the larger of both."""
        return max(moved / self.bytes, work / self.flops)


def ceilings(job: Job) -> Ceilings:
    """Of the job's device, the best of several rounds; measured once a process."""
    return _ceilings(job.device_name, job.dtype_name, job.size.name)


@cache
def _ceilings(device: str, dtype: str, size_name: str) -> Ceilings:
    size = SIZES[size_name]
    job, rounds = Job("ceilings", dtype, device, 0, Path(), size), 4 * size.rounds
    source = torch.randn(size.copy_bytes // 4, device=job.device)
    target = torch.empty_like(source)
    times = job.in_turn({"copy": lambda: target.copy_(source), "read": source.sum}, rounds)
    moved = source.nbytes
    copied, read = 2 * moved / min(times["copy"]), moved / min(times["read"])
    x = torch.randn(size.matrix, size.matrix, device=job.device).to(job.dtype)
    product = job.in_turn({"product": lambda: x @ x}, rounds)["product"]
    return Ceilings(copied, read, 2 * size.matrix**3 / min(product))


def bandwidth(job: Job) -> dict[str, Any]:
    """Bytes that the device moves in a second, in GB/s: a copy counts what it reads and what it writes."""
    found = ceilings(job)
    details = {"copied": found.copied / 1e9, "read": found.read / 1e9, "product_gflops": found.flops / 1e9}
    return job.line(found.bytes / 1e9, "GB/s", **details)


def product_weights(c: DecoderConfig) -> int:
    """Numbers in the weights that a token is multiplied with: those of all layers, and the projection to logits."""
    inner, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return c.layers * (2 * c.width * inner + 2 * c.width * kv + 3 * c.width * c.ffn_width) + c.vocab_size * c.width


def decoding_floor(c: DecoderConfig, rows: int, held: float, number_bytes: int, found: Ceilings) -> dict[str, float]:
    """The least seconds of one decoding step, and what they are made of.

    bytes: every weight once, each row's keys and values of `held` tokens once, and those of the new token written;
    FLOPs: 2 for each weight and row, 4 for each query head's number and token held.
    """
    weights, cached = product_weights(c), 2 * c.layers * c.kv_heads * c.head_dim
    moved = number_bytes * (weights + rows * cached * (held + 1))
    work = 2.0 * rows * weights + 4.0 * rows * c.layers * c.heads * c.head_dim * held
    return {"floor_s": found.seconds(moved, work), "bytes": moved, "flops": work}
