"""Which completion stands in which slot. Plain integers, no tensors.

Live slots are 0 to live - 1. A completion that ends frees its slot; a waiting one takes a free slot, and when none
waits the last live slot moves into the gap, so that a step never computes a row that nobody reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from upslope.engine.types import Completion, Request


@dataclass(frozen=True)
class Admission:
    """One prompt to compute now, and the slots its samples take."""

    request: int
    slots: tuple[int, ...]


class Scheduler:
    """Waiting samples in order, running ones by slot, finished ones."""

    def __init__(self, requests: Sequence[Request], slots: int, version: int) -> None:
        self.requests = requests
        self.slots = slots
        self.waiting: deque[Completion] = deque(
            Completion(request=r, sample=s, version=version)
            for r, request in enumerate(requests)
            for s in range(request.samples)
        )
        self.running: list[Completion] = []
        self.finished: list[Completion] = []

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    def admit(self, token_budget: int) -> list[Admission]:
        """Give free slots to waiting samples, prompt by prompt, up to a budget of prompt tokens (one at the least).

        The samples of a prompt that find slots together are computed once.
        """
        admitted: dict[int, list[int]] = {}
        tokens = 0
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting[0].request
            if request not in admitted:
                length = len(self.requests[request].prompt_ids)
                if admitted and tokens + length > token_budget:
                    break
                tokens += length
            admitted.setdefault(request, []).append(len(self.running))
            self.running.append(self.waiting.popleft())
        return [Admission(request, tuple(slots)) for request, slots in admitted.items()]

    def retire(self, ended: Sequence[int]) -> list[tuple[int, int]]:
        """Take finished slots out; returns the moves (from, to) that close the gaps, in the order to make them."""
        moves = []
        for slot in sorted(ended, reverse=True):
            self.finished.append(self.running[slot])
            last = len(self.running) - 1
            if slot != last:
                moves.append((last, slot))
                self.running[slot] = self.running[last]
            self.running.pop()
        return moves

    def results(self) -> list[Completion]:
        """All finished completions, request by request and sample by sample."""
        return sorted(self.finished, key=lambda c: (c.request, c.sample))
