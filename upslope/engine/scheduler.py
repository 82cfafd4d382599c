"""Which completion stands in which slot. Plain integers, no tensors.

The longest limits go first, so that the end is not spent on a few that began late; slots that come free one by one are
filled some at a time, since a prompt alone costs nearly what several do.

Live slots are 0 to live - 1. A completion that ends frees its slot; a waiting one takes a free slot, and when none
waits the last live slot moves into the gap, so that a step never computes a row that nobody reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from upslope.engine.types import Completion, Request

TOGETHER = 16  # share of the slots that are filled together, as 1 in so many


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
        longest_first = sorted(range(len(requests)), key=lambda r: -requests[r].sampling.max_tokens)
        self.waiting: deque[Completion] = deque(
            Completion(request=r, sample=s, version=version) for r in longest_first for s in range(requests[r].samples)
        )
        self.running: list[Completion] = []
        self.finished: list[Completion] = []

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    def admit(self, token_budget: int) -> list[Admission]:
        """Give free slots to waiting samples, prompt by prompt, up to a budget of prompt tokens (one at the least).

        The samples of a prompt that find slots together are computed once. Nothing is admitted while fewer slots are
        free than a sixteenth of all, unless nothing runs or no more wait.
        """
        free = self.slots - len(self.running)
        if self.running and free < min(max(1, self.slots // TOGETHER), len(self.waiting)):
            return []
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
