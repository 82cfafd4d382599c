"""What a step of the engine reads of the completions that run: made once for as long as they are the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from upslope.algo.random import uniform
from upslope.engine.types import Completion, Request

AHEAD = 8  # tokens for which random numbers are drawn at once; each depends on its own place alone


class Batch:
    """The running completions, in the order of their slots, with what their requests ask for."""

    def __init__(self, completions: Sequence[Completion], requests: Sequence[Request], device: torch.device) -> None:
        self.completions = list(completions)
        self.asked = [requests[c.request] for c in self.completions]
        sampling = [r.sampling for r in self.asked]
        self.temperature_S = torch.tensor([s.temperature for s in sampling], dtype=torch.float32, device=device)
        self.top_k, self.top_p = [s.top_k for s in sampling], [s.top_p for s in sampling]
        self.drawn: list[Tensor] = []

    def uniform(self, seed: int, step: int) -> Tensor:
        """The random number of each completion's next token (S); to be asked for once a token."""
        if not self.drawn:
            keys = np.array([r.key for r in self.asked])[:, None]
            samples = np.array([c.sample for c in self.completions])[:, None]
            places = np.array([len(c.ids) for c in self.completions])[:, None] + np.arange(AHEAD)
            table = torch.from_numpy(uniform(seed, step, keys, samples, places)).t().contiguous()
            self.drawn = list(table.to(self.temperature_S.device).unbind())[::-1]
        return self.drawn.pop()
