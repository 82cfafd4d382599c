"""Algorithms as rows of one table: how advantages are made, which per-token loss, what they need.

The loop in rl.py is blind to the name. A row's two functions take the recipe's [rl] table and flat tensors over A
action tokens; the mathematics is in upslope.algo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from upslope.algo import clipped_policy_loss, gae, whiten
from upslope.config import RL

Loss = tuple[Tensor, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Algorithm:
    """advantages(rl, reward_A, value_A, starts, bootstrap_B) and policy_loss(rl, logp_A, old_logp_A, advantage_A)."""

    advantages: Callable[[RL, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    policy_loss: Callable[[RL, Tensor, Tensor, Tensor], Loss]
    needs_critic: bool
    needs_reference: bool


def gae_advantages(
    rl: RL, reward_A: Tensor, value_A: Tensor, starts: Tensor, bootstrap_B: Tensor
) -> tuple[Tensor, Tensor]:
    """GAE, whitened over the rollout's actions when the recipe says so; returns (advantage_A, return_A)."""
    advantage_A, return_A = gae(reward_A, value_A, starts, gamma=rl.gamma, lam=rl.lam, bootstrap_B=bootstrap_B)
    return (whiten(advantage_A) if rl.scale == "batch" else advantage_A), return_A


def clipped_surrogate(rl: RL, logp_A: Tensor, old_logp_A: Tensor, advantage_A: Tensor) -> Loss:
    return clipped_policy_loss(logp_A, old_logp_A, advantage_A, clip_low=rl.clip_low, clip_high=rl.clip_high)


ALGORITHMS: Mapping[str, Algorithm] = {
    "ppo": Algorithm(gae_advantages, clipped_surrogate, needs_critic=True, needs_reference=True),
}
