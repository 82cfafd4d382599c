"""Decoding on a GPU: some tokens for every running slot between two looks of the host.

A step (attention, products, the choice of a token) reads all that changes from the card's memory, so that it is
recorded once for a number of slots, as a CUDA graph, and played again. What a slot writes behind the token that ended
it is thrown away: its random numbers are its own, so that no other completion is moved by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from upslope.algo.random import key_words
from upslope.engine.types import Completion, Request
from upslope.kernels import gpu
from upslope.kernels.products import Product
from upslope.models.cache import DecoderCache
from upslope.models.runner import DecoderRunner

STEPS = 16  # tokens between two looks
ROOM = 64  # a cache's capacity is a multiple of this, so that prompts of other lengths find it large enough


def slots_recorded(n: int) -> int:
    """For how many slots a step is recorded that runs n of them: multiples of 8, and few sizes beyond 64."""
    step = max(8, 1 << max(0, (n - 1).bit_length() - 3))
    return max(1, -(-n // step)) * step


class Graphs:
    """The steps of one decoder; the cache and what was recorded stay from one generation to the next."""

    def __init__(self, runner: DecoderRunner, project: Product, slots: int, valid: int | None) -> None:
        self.runner, self.project = runner, project
        self.slots = slots_recorded(slots)
        self.valid = min(valid or runner.config.vocab_size, runner.config.vocab_size)
        device = runner.device
        self.facts = torch.zeros(6, self.slots, dtype=torch.int64, device=device)
        self.heat = torch.ones(self.slots, device=device)
        self.key = torch.zeros(2, dtype=torch.int64, device=device)
        self.ids = torch.zeros(STEPS, self.slots, dtype=torch.int64, device=device)
        self.logp = torch.zeros(STEPS, self.slots, device=device)
        self.cache = runner.new_cache(0, 0)
        self.capacity = 0
        self.recorded: dict[int, Callable[[], None]] = {}
        self.pool: Any = None  # the work space of all sizes

    @staticmethod
    def serve(runner: object, requests: Sequence[Request]) -> bool:
        """Whether a step can be recorded: our decoder on a GPU, and no distribution that is cut (sorted, that is)."""
        return (
            isinstance(runner, DecoderRunner)
            and gpu.serve(runner.embed)
            and not any(r.sampling.top_k or r.sampling.top_p < 1 for r in requests)
        )

    def new_cache(self, capacity: int) -> DecoderCache:
        """A cache with room for `capacity` tokens a slot: the one there is, where it is large enough."""
        if capacity + STEPS > self.capacity:
            self.recorded.clear()  # they write into the old one
            self.pool = None
            self.capacity = -(-(capacity + STEPS) // ROOM) * ROOM
            self.cache = self.runner.new_cache(0, 0)  # frees the old one first
            self.cache = self.runner.new_cache(self.slots, self.capacity)
        self.cache.length = [0] * self.slots
        return self.cache

    def run(
        self, running: Sequence[Completion], requests: Sequence[Request], seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """The next tokens of each running completion, the last of which has its token not yet read: ids and logp
        (steps, running), on the CPU. Steps: as many as the one that may go on longest still needs, at most STEPS."""
        asked = [requests[c.request] for c in running]
        n, size = len(running), slots_recorded(len(running))
        held = self.cache.length[:n]
        left = max(r.sampling.max_tokens - len(c.ids) for c, r in zip(running, asked, strict=True))
        steps = min(STEPS, left)
        rows = [[c.ids[-1] for c in running], held, held, [r.key for r in asked], [c.sample for c in running]]
        facts = torch.zeros(6, size, dtype=torch.int64)
        facts[:, :n] = torch.tensor([*rows, [len(c.ids) for c in running]])
        heat = torch.tensor([r.sampling.temperature for r in asked] + [1.0] * (size - n))
        key = torch.tensor(key_words(seed, step))

        def place() -> None:
            self.facts[:, :size].copy_(facts)
            self.heat[:size].copy_(heat)
            self.key.copy_(key)

        place()
        if size not in self.recorded:
            self.recorded[size] = self._record(size)
            place()  # what recording has moved
        for _ in range(steps):
            self.recorded[size]()
        for slot in range(n):
            self.cache.length[slot] += steps
        return self.ids[:steps, :n].cpu(), self.logp[:steps, :n].cpu()

    def _step(self, size: int) -> None:
        hidden = self.runner.advance(self.cache, self.facts[0, :size], self.facts[1, :size])
        logits = self.project(hidden)
        gpu.choose_next(logits, self.heat, self.facts, self.key, self.ids, self.logp, self.valid)

    def _record(self, size: int) -> Callable[[], None]:
        """A step for so many slots, once done before it is recorded: libraries make their work space at first use."""
        if self.facts.device.type != "cuda":  # the tests' interpreter
            return lambda: self._step(size)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._step(size)
        self.pool = graph.pool()
        return graph.replay
