"""The natural gradient: solving with a matrix that is only known by its products."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b_N: Float[Tensor, " N"], *, steps: int = 10, tolerance: float = 1e-10
) -> Float[Tensor, " N"]:
    """x with F x = b, where product(v) = F v for a symmetric positive definite F.

        x += a p,   r -= a F p,   p = r + (|r_new|^2 / |r|^2) p,   a = |r|^2 / (p F p)

    Ends after `steps` products, or when |r|^2 falls to `tolerance` times |b|^2; n of them solve n equations exactly.
    Hestenes and Stiefel 1952. Raises ValueError for a direction along which F is not positive.
    """
    x_N, r_N, p_N = torch.zeros_like(b_N), b_N.clone(), b_N.clone()
    square = start = torch.dot(r_N, r_N)
    for _ in range(steps):
        if float(square) <= tolerance * float(start):
            break
        product_N = product(p_N)
        curvature = torch.dot(p_N, product_N)
        if not float(curvature) > 0:
            raise ValueError(f"the matrix is not positive along a direction: {float(curvature)}")
        length = square / curvature
        x_N += length * p_N
        r_N -= length * product_N
        before, square = square, torch.dot(r_N, r_N)
        p_N = r_N + (square / before) * p_N
    return x_N


def trust_region_step(
    direction_N: Float[Tensor, " N"], product: Callable[[Tensor], Tensor], *, max_kl: float
) -> Float[Tensor, " N"]:
    """The direction, as long as the quadratic model of the KL allows: sqrt(2 max_kl / (x F x)) x.

    Zero where x F x is 0. Schulman et al. 2015, "Trust Region Policy Optimization", appendix C (arXiv 1502.05477).
    """
    curvature = float(torch.dot(direction_N, product(direction_N)))
    return direction_N * (2 * max_kl / curvature) ** 0.5 if curvature > 0 else torch.zeros_like(direction_N)
