"""Per-token and per-pair losses: not reduced, with detached per-element statistics beside them.

The caller divides sums by denominators of the whole optimizer batch (reduce.py).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Stats = dict[str, Tensor]

_HIGH = 80.0  # e^80 is finite in fp32, and no clip is as wide


def policy_gradient_loss(
    logp_A: Float[Tensor, " A"], advantage_A: Float[Tensor, " A"]
) -> tuple[Float[Tensor, " A"], Stats]:
    """The score-function loss, one value per action token.

        L_t = -A_t log pi(a_t | s_t),   so that its gradient is -A_t grad log pi(a_t | s_t)

    Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning".
    """
    return -advantage_A.detach() * logp_A, {}


def clipped_policy_loss(
    logp_A: Float[Tensor, " A"],
    old_logp_A: Float[Tensor, " A"],
    advantage_A: Float[Tensor, " A"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, " A"], Stats]:
    """PPO's clipped surrogate, one value per action token.

        L_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),   r_t = exp(logp_t - old_logp_t)
        with dual_clip c > 1 and A_t < 0:  L_t = min(L_t, -c A_t)

    Statistics: ratio_A, clipped_A (a bound, not the plain product, is the loss), approx_kl_A (k3 of old to new).
    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7 (arXiv 1707.06347). Two separate bounds
    follow DAPO (arXiv 2503.14476), equal values give PPO; dual clip: Ye et al. 2020 (arXiv 1912.09729). Raises
    ValueError for a clip that is not positive or a dual clip of at most 1.
    """
    if clip_low <= 0 or clip_high <= 0 or (dual_clip is not None and dual_clip <= 1):
        raise ValueError(f"clips must be positive and dual_clip above 1: {clip_low}, {clip_high}, {dual_clip}")
    advantage_A = advantage_A.detach()
    log_ratio_A = logp_A - old_logp_A.detach()
    # where a bound is the loss anyway, a ratio that overflows must not turn its zero gradient into 0 * inf
    bounded_A = (advantage_A >= 0) | (dual_clip is not None)
    ratio_A = torch.exp(torch.where(bounded_A & (log_ratio_A > _HIGH), _HIGH, log_ratio_A))
    plain_A = ratio_A * advantage_A
    clipped_A = ratio_A.clamp(1 - clip_low, 1 + clip_high) * advantage_A
    loss_A = -torch.minimum(plain_A, clipped_A)
    was_clipped_A = clipped_A < plain_A
    if dual_clip is not None:
        cap_A = -dual_clip * advantage_A
        was_clipped_A = was_clipped_A | ((advantage_A < 0) & (loss_A > cap_A))
        loss_A = torch.where(advantage_A < 0, torch.minimum(loss_A, cap_A), loss_A)
    drift_A = log_ratio_A.detach()
    stats = {
        "ratio_A": torch.exp(drift_A),
        "clipped_A": was_clipped_A.to(drift_A.dtype),
        "approx_kl_A": torch.expm1(drift_A) - drift_A,  # ratio - 1 would be all rounding for small drifts
    }
    return loss_A, stats


def value_loss(
    value_A: Float[Tensor, " A"],
    return_A: Float[Tensor, " A"],
    *,
    kind: str = "squared",
    old_value_A: Float[Tensor, " A"] | None = None,
    clip: float | None = None,
) -> tuple[Float[Tensor, " A"], Stats]:
    """The critic's regression on returns, one value per action token.

        squared: (V - R)^2 / 2        huber: that within 1 of R, |V - R| - 1/2 beyond
        with clip e: the larger of the loss of V and of the loss of V_old + clip(V - V_old, -e, e)

    Statistics: clipped_A. Clipping follows the reference code of PPO (arXiv 1707.06347). Raises ValueError for a
    clip that is not positive or without old values.
    """
    if kind not in ("squared", "huber"):
        raise ValueError(f"no value loss {kind!r}: squared or huber")
    return_A = return_A.detach()
    loss_A = _regression(value_A, return_A, kind)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be positive: {clip}")
    if clip is None:
        return loss_A, {"clipped_A": torch.zeros_like(return_A)}
    if old_value_A is None:
        raise ValueError("clip needs old_value_A")
    old_value_A = old_value_A.detach()
    near_A = old_value_A + (value_A - old_value_A).clamp(-clip, clip)
    near_loss_A = _regression(near_A, return_A, kind)
    clipped_A = (near_loss_A > loss_A).to(return_A.dtype).detach()
    return torch.maximum(loss_A, near_loss_A), {"clipped_A": clipped_A}


def bradley_terry_loss(
    chosen_B: Float[Tensor, " B"],
    rejected_B: Float[Tensor, " B"],
    *,
    margin_B: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, " B"], Stats]:
    """Minus the log-likelihood that the chosen one of each pair wins.

        L = -log sigmoid(s_chosen - s_rejected - margin)

    Statistics: correct_B, margin_B. Bradley and Terry 1952; margins: Touvron et al. 2023 (arXiv 2307.09288).
    """
    gap_B = chosen_B - rejected_B
    stats = {"correct_B": (gap_B > 0).to(gap_B.dtype).detach(), "margin_B": gap_B.detach()}
    return -F.logsigmoid(gap_B if margin_B is None else gap_B - margin_B), stats


def _regression(value_A: Tensor, return_A: Tensor, kind: str) -> Tensor:
    if kind == "huber":
        return F.huber_loss(value_A, return_A, reduction="none", delta=1.0)
    return 0.5 * (value_A - return_A) ** 2
