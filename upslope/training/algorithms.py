"""What the keys of [rl] name: how credit is given, and which loss a policy follows.

The loop in rl.py is blind to the algorithm: `algorithm = "grpo"` only sets keys (config/presets.py), and each key's
value is looked up once in the tables below. The mathematics is in upslope.algo; all tensors are flat over A action
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from upslope.algo import (
    best_of_group,
    cispo_loss,
    clipped_policy_loss,
    discounted_returns,
    gae,
    group_advantages,
    group_deviation,
    policy_gradient_loss,
    sequence_clipped_loss,
    surrogate_loss,
    whiten,
)
from upslope.config import RL

Loss = tuple[Tensor, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Signal:
    """What a rollout has to say: rewards and values of its actions, which episodes share a prompt (group_B), what
    follows a cut (bootstrap_B), and the mean return (or total) of the rollouts before (running)."""

    reward_A: Tensor
    value_A: Tensor
    starts: Tensor
    bootstrap_B: Tensor
    group_B: Tensor
    running: float = 0.0

    def spread(self, x_B: Tensor) -> Tensor:
        """One number an episode to all its actions."""
        return x_B.repeat_interleave(self.starts[1:] - self.starts[:-1])

    def totals(self, gamma: float) -> Tensor:
        """The return of each episode from its first action on, what follows a cut included; 0 without actions."""
        return_A = discounted_returns(self.reward_A, self.starts, gamma=gamma, bootstrap_B=self.bootstrap_B)
        acted_B = self.starts[1:] > self.starts[:-1]
        total_B = return_A.new_zeros(len(acted_B))
        total_B[acted_B] = return_A[self.starts[:-1][acted_B]]
        return total_B


@dataclass(frozen=True)
class Credit:
    """advantage_A as the losses take it, return_A for the critic, what the running baseline remembers (None where
    there was nothing), and statistics from before any scaling."""

    advantage_A: Tensor
    return_A: Tensor
    mean: float | None
    metrics: dict[str, float]


def credit(rl: RL, signal: Signal) -> Credit:
    """Advantages by rl.credit and rl.baseline, then scaled by rl.scale: over the rollout, or in each group.

    The metrics compare what the critic made of the rewards with what came of them: bias and rmse of the lambda-return
    against the Monte-Carlo return of the same action (0 for credit = to_go and episode), and the advantages'
    deviation before they are scaled, all over the rollout's action tokens.
    """
    advantage_A, return_A = CREDITS[rl.credit](rl, signal)
    plain_A = _returns(rl, signal)
    gap_A = return_A - plain_A
    metrics = {}
    if len(advantage_A):  # of nothing there is no mean
        metrics["advantage/std"] = float(advantage_A.std(correction=0))
        metrics |= {"advantage/bias": _mean(gap_A), "advantage/rmse": _mean(gap_A.square()) ** 0.5}
    seen = signal.totals(rl.gamma) if rl.credit == "episode" else plain_A
    scaled_A = SCALES[rl.scale](rl, signal, advantage_A)
    return Credit(scaled_A, return_A, _mean(seen) if len(seen) else None, metrics)


def _returns(rl: RL, s: Signal) -> Tensor:
    return discounted_returns(s.reward_A, s.starts, gamma=rl.gamma, bootstrap_B=s.bootstrap_B)


def _gae(rl: RL, s: Signal) -> tuple[Tensor, Tensor]:
    return gae(s.reward_A, s.value_A, s.starts, gamma=rl.gamma, lam=rl.lam, bootstrap_B=s.bootstrap_B)


def _to_go(rl: RL, s: Signal) -> tuple[Tensor, Tensor]:
    """The return from each action on, less a baseline that does not know the action."""
    return_A = _returns(rl, s)
    return return_A - TO_GO_BASELINES[rl.baseline](rl, s, return_A), return_A


def _episode(rl: RL, s: Signal) -> tuple[Tensor, Tensor]:
    """One advantage for all actions of an episode: what it earned in all, against its baseline."""
    return s.spread(EPISODE_BASELINES[rl.baseline](rl, s, s.totals(rl.gamma))), _returns(rl, s)


def _against_group(rl: RL, s: Signal, total_B: Tensor) -> Tensor:
    baseline = "leave_one_out" if rl.baseline == "leave_one_out" else "mean"
    return group_advantages(total_B, s.group_B, baseline=baseline)


def _group_baseline(rl: RL, s: Signal, return_A: Tensor) -> Tensor:
    """The mean total of an episode's group (of the others of it), at each of its actions."""
    total_B = s.totals(rl.gamma)
    return s.spread(total_B - _against_group(rl, s, total_B))


def _mean(x: Tensor) -> float:
    return float(x.mean()) if len(x) else 0.0


CREDITS: Mapping[str, Callable[[RL, Signal], tuple[Tensor, Tensor]]] = {
    "gae": _gae,
    "to_go": _to_go,
    "episode": _episode,
}
TO_GO_BASELINES: Mapping[str, Callable[[RL, Signal, Tensor], Tensor]] = {
    "none": lambda rl, s, return_A: torch.zeros_like(return_A),
    "mean": lambda rl, s, return_A: torch.full_like(return_A, _mean(return_A)),
    "running": lambda rl, s, return_A: torch.full_like(return_A, s.running),
    "critic": lambda rl, s, return_A: s.value_A,
    "group": _group_baseline,
    "leave_one_out": _group_baseline,
}
EPISODE_BASELINES: Mapping[str, Callable[[RL, Signal, Tensor], Tensor]] = {
    "none": lambda rl, s, total_B: total_B,
    "mean": lambda rl, s, total_B: total_B - _mean(total_B),
    "running": lambda rl, s, total_B: total_B - s.running,
    "critic": lambda rl, s, total_B: total_B - s.value_A[s.starts[:-1]],
    "group": _against_group,
    "leave_one_out": _against_group,
    "best": lambda rl, s, total_B: best_of_group(total_B, s.group_B),
}
SCALES: Mapping[str, Callable[[RL, Signal, Tensor], Tensor]] = {
    "none": lambda rl, s, advantage_A: advantage_A,
    "batch": lambda rl, s, advantage_A: whiten(advantage_A),
    "group": lambda rl, s, advantage_A: advantage_A / s.spread(group_deviation(s.totals(rl.gamma), s.group_B)),
}
POLICY_LOSSES: Mapping[str, Callable[[RL, Tensor, Tensor, Tensor, Tensor], Loss]] = {
    "clip": lambda rl, logp_A, old_logp_A, advantage_A, starts: clipped_policy_loss(
        logp_A, old_logp_A, advantage_A, clip_low=rl.clip_low, clip_high=rl.clip_high, dual_clip=rl.dual_clip
    ),
    "surrogate": lambda rl, logp_A, old_logp_A, advantage_A, starts: surrogate_loss(logp_A, old_logp_A, advantage_A),
    "policy_gradient": lambda rl, logp_A, old_logp_A, advantage_A, starts: policy_gradient_loss(logp_A, advantage_A),
    "sequence_clip": lambda rl, logp_A, old_logp_A, advantage_A, starts: sequence_clipped_loss(
        logp_A, old_logp_A, advantage_A, starts, clip_low=rl.clip_low, clip_high=rl.clip_high
    ),
    "cispo": lambda rl, logp_A, old_logp_A, advantage_A, starts: cispo_loss(
        logp_A, old_logp_A, advantage_A, clip_high=rl.clip_high
    ),
    "none": lambda rl, logp_A, old_logp_A, advantage_A, starts: (torch.zeros_like(logp_A), {}),
}
