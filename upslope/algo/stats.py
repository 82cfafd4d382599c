"""Statistics over the given elements: what is not given does not count."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def whiten(x_A: Float[Tensor, " A"], *, shift_mean: bool = True) -> Float[Tensor, " A"]:
    """Scale to variance 1 (population variance over the elements given) and, unless told not to, shift to mean 0.

    1e-8 is added to the variance, so what varies by less than about 1e-4 is scaled by less than that. Elements that
    are all equal become exactly 0 when shifted, and stay as they are otherwise.
    """
    if x_A.numel() == 0 or bool(x_A.max() == x_A.min()):
        return torch.zeros_like(x_A) if shift_mean else x_A
    mean = x_A.mean()
    scaled_A = (x_A - mean) * torch.rsqrt(x_A.var(correction=0) + 1e-8)
    return scaled_A if shift_mean else scaled_A + mean


def explained_variance(value_A: Float[Tensor, " A"], return_A: Float[Tensor, " A"]) -> float:
    """1 - Var(return - value) / Var(return): 1 is a perfect critic, 0 no better than a constant; 0 where undefined."""
    if return_A.numel() == 0 or bool(return_A.max() == return_A.min()):  # the variance of equal floats is a residue
        return 0.0
    variance = float(return_A.var(correction=0))
    return 0.0 if variance == 0 else 1.0 - float((return_A - value_A).var(correction=0)) / variance


class RunningMoments:
    """Count, mean and population deviation of all numbers seen so far, merged a batch at a time.

        mean += d m / n,   M2 += M2_batch + d^2 n_before m / n,   d = mean_batch - mean,   deviation = sqrt(M2 / n)

    Chan, Golub and LeVeque 1979. Numbers that are not finite raise ValueError.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, x_B: Float[Tensor, " B"]) -> None:
        """Take in some numbers."""
        x_B = x_B.double()
        if not bool(torch.isfinite(x_B).all()):
            raise ValueError("a number that is not finite has no place in running moments")
        added = len(x_B)
        if not added:
            return
        mean = float(x_B.mean())
        m2 = 0.0 if bool(x_B.max() == x_B.min()) else float(((x_B - mean) ** 2).sum())
        total, distance = self.count + added, mean - self.mean
        self.m2 += m2 + distance**2 * self.count * added / total
        self.mean += distance * added / total
        self.count = total

    @property
    def deviation(self) -> float:
        """1 while all numbers so far are equal: nothing to scale by."""
        return math.sqrt(self.m2 / self.count) if self.count and self.m2 > 0 else 1.0

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def restore(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), float(state["mean"]), float(state["m2"])
