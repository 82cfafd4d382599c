"""What an RL stage learns about its own rollouts and carries from one to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from upslope.algo import AdaptiveKL, AdaptivePenalty, RunningMoments
from upslope.config import RL

MEMORY = 0.9  # of the running baseline, a rollout


class Controllers:
    """The price of the distance to the start, the penalty on a rollout's own drift, the moments of all scores, the
    running mean of returns, and how many prompts have been used."""

    def __init__(self, rl: RL) -> None:
        self.kl = AdaptiveKL(target=rl.kl_target, horizon=rl.kl_horizon if rl.kl_target else None, coefficient=rl.kl)
        self.trust = AdaptivePenalty(rl.trust.target, rl.trust.penalty)
        self.scores = RunningMoments()
        self.returns: float | None = None
        self.used = 0

    def score_scale(self, rl: RL) -> float:
        """What scores are divided by."""
        return self.scores.deviation if rl.reward_norm == "running" else 1.0

    def saw_scores(self, totals: Sequence[float]) -> None:
        self.scores.update(torch.tensor(totals, dtype=torch.float64))

    def saw_return(self, mean: float | None) -> None:
        """Take a rollout's mean return, where it is a number, into the baseline: that of the rollouts before it."""
        if mean is None or not math.isfinite(mean):
            return
        self.returns = mean if self.returns is None else MEMORY * self.returns + (1 - MEMORY) * mean

    def state(self) -> dict[str, Any]:
        return {
            "kl": self.kl.state(),
            "trust": self.trust.state(),
            "scores": self.scores.state(),
            "returns": self.returns,
            "used": self.used,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.kl.restore(state["kl"])
        self.trust.restore(state["trust"])
        self.scores.restore(state["scores"])
        self.returns, self.used = state["returns"], state["used"]
