"""Statistics over the given elements: what is not given does not count."""

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
