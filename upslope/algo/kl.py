"""The distance to a reference: estimators from samples, and the controller of its price."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def kl_estimate(logp_A: Float[Tensor, " A"], ref_logp_A: Float[Tensor, " A"], kind: str = "k3") -> Float[Tensor, " A"]:
    """KL(policy, reference) at each action token, from the sampled action alone; d = logp - ref_logp.

        k1 = d                    unbiased, may be negative; its gradient has mean 0: for rewards and reports only
        k2 = d^2 / 2              biased value; on-policy, in each state, the gradient of the true KL
        k3 = exp(-d) - 1 + d      unbiased, never negative; its gradient is that of KL(reference, policy)

    Schulman 2020, "Approximating KL Divergence". Raises ValueError for another kind.
    """
    d_A = logp_A - ref_logp_A
    if kind == "k1":
        return d_A
    if kind == "k2":
        return 0.5 * d_A**2
    if kind == "k3":
        return torch.expm1(-d_A) + d_A
    raise ValueError(f"no KL estimator {kind!r}: k1, k2 or k3")


class AdaptiveKL:
    """The coefficient of a KL penalty, led towards a target; once a rollout, with its number of episodes.

        error = clip(kl / target - 1, -0.2, 0.2);   coefficient *= 1 + error * episodes / horizon

    Without a target or horizon it stays as it is. Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. Raises
    ValueError for a target or horizon that is not positive, a KL that is not finite, or more than 5 horizons of
    episodes at once: one more and the price would turn negative.
    """

    def __init__(self, target: float | None, horizon: int | None, coefficient: float) -> None:
        if (target is not None and not target > 0) or (horizon is not None and not horizon > 0):
            raise ValueError(f"target {target} and horizon {horizon} must be positive")
        self.target = target
        self.horizon = horizon
        self.coefficient = coefficient

    def update(self, kl: float, episodes: int) -> None:
        """Take in the mean KL of a rollout's episodes, in nats."""
        if self.target is None or self.horizon is None:
            return
        if not math.isfinite(kl) or episodes >= 5 * self.horizon:
            raise ValueError(f"KL {kl} over {episodes} episodes cannot lead a coefficient of horizon {self.horizon}")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * episodes / self.horizon

    def state(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, Any]) -> None:
        self.coefficient = float(state["coefficient"])


class AdaptivePenalty:
    """The coefficient of PPO's penalty on KL(old, new), led towards a target; once a rollout.

        coefficient *= 2 where KL > 1.5 target,   /= 2 where KL < target / 1.5

    Without a target it stays as it is. Schulman et al. 2017, section 4 (arXiv 1707.06347). Raises ValueError for a
    target that is not positive or a KL that is not finite.
    """

    def __init__(self, target: float | None, coefficient: float) -> None:
        if target is not None and not target > 0:
            raise ValueError(f"target {target} must be positive")
        self.target = target
        self.coefficient = coefficient

    def update(self, kl: float) -> None:
        """Take in the mean KL per action token that a rollout's steps led to, in nats."""
        if self.target is None:
            return
        if not math.isfinite(kl):
            raise ValueError(f"KL {kl} cannot lead a coefficient")
        if kl > 1.5 * self.target:
            self.coefficient *= 2.0
        elif kl < self.target / 1.5:
            self.coefficient /= 2.0

    def state(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, Any]) -> None:
        self.coefficient = float(state["coefficient"])
