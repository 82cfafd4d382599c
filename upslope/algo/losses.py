"""Per-token losses: not reduced, with detached per-element statistics beside them.

The caller divides sums by denominators of the whole optimizer batch (reduce.py).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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


def surrogate_loss(
    logp_A: Float[Tensor, " A"], old_logp_A: Float[Tensor, " A"], advantage_A: Float[Tensor, " A"]
) -> tuple[Float[Tensor, " A"], Stats]:
    """The plain importance-sampled surrogate: PPO's without its clip, what TRPO improves inside its bound.

        L_t = -r_t A_t,   r_t = exp(logp_t - old_logp_t)

    Statistics: ratio_A. Schulman et al. 2015, "Trust Region Policy Optimization", eq. 14 (arXiv 1502.05477).
    """
    ratio_A = torch.exp(logp_A - old_logp_A.detach())
    return -ratio_A * advantage_A.detach(), {"ratio_A": ratio_A.detach()}


def sequence_clipped_loss(
    logp_A: Float[Tensor, " A"],
    old_logp_A: Float[Tensor, " A"],
    advantage_A: Float[Tensor, " A"],
    starts: Int[Tensor, " B1"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[Float[Tensor, " A"], Stats]:
    """GSPO's clipped surrogate: one ratio for a whole episode, so that all its tokens are clipped or none.

        L_t = -min(s_i A_t, clip(s_i, 1 - clip_low, 1 + clip_high) A_t),   s_i = exp(mean over t of logp_t - old_logp_t)

    The value stands at every token of the episode; with the `sequence` reduction this is the paper's loss. `starts`
    as in returns.py. Statistics: ratio_A (s_i), clipped_A. Zheng et al. 2025, "Group Sequence Policy Optimization",
    eq. 5 (arXiv 2507.18071). Raises ValueError for a clip that is not positive.
    """
    counts = starts[1:] - starts[:-1]
    episode_A = torch.arange(len(counts), device=logp_A.device).repeat_interleave(counts.to(logp_A.device))
    drift_A = logp_A - old_logp_A.detach()
    sums_B = drift_A.new_zeros(len(counts)).index_add(0, episode_A, drift_A)
    mean_A = (sums_B / counts.clamp_min(1).to(drift_A))[episode_A]
    loss_A, stats = clipped_policy_loss(
        mean_A, torch.zeros_like(mean_A), advantage_A, clip_low=clip_low, clip_high=clip_high
    )
    return loss_A, {"ratio_A": stats["ratio_A"], "clipped_A": stats["clipped_A"]}


def cispo_loss(
    logp_A: Float[Tensor, " A"],
    old_logp_A: Float[Tensor, " A"],
    advantage_A: Float[Tensor, " A"],
    *,
    clip_high: float = 4.0,
) -> tuple[Float[Tensor, " A"], Stats]:
    """The score-function loss under importance weights that are cut from above: no token loses its gradient.

        L_t = -w_t A_t logp_t,   w_t = min(exp(logp_t - old_logp_t), 1 + clip_high), without a gradient of its own

    Statistics: ratio_A, clipped_A (the weight was cut). MiniMax 2025, "MiniMax-M1", eq. 4 (arXiv 2506.13585), which
    leaves the lower bound out too and does not state the upper one; 1 + clip_high = 5 follows arXiv 2510.13786.
    Raises ValueError for a clip that is not positive.
    """
    if clip_high <= 0:
        raise ValueError(f"clip_high must be positive: {clip_high}")
    ratio_A = torch.exp((logp_A - old_logp_A).detach())
    weight_A = ratio_A.clamp(max=1 + clip_high)
    stats = {"ratio_A": ratio_A, "clipped_A": (ratio_A > 1 + clip_high).to(ratio_A.dtype)}
    return -weight_A * advantage_A.detach() * logp_A, stats


def importance_weights(
    logp_A: Float[Tensor, " A"], behaviour_logp_A: Float[Tensor, " A"], *, kind: str = "truncate", cap: float = 2.0
) -> tuple[Float[Tensor, " A"], Stats]:
    """Weights that turn samples of one policy into samples of another, bounded; both sides are detached.

        w_t = exp(logp_t - behaviour_logp_t)
        truncate: min(w_t, cap)             mask: w_t where 1 / cap <= w_t <= cap, else 0

    logp_A: of the policy whose samples are wanted (the trainer's, at the rollout); behaviour_logp_A: as the sampler
    said. A masked token adds 0 to a loss and still counts in its denominator: the weight of the others does not grow.
    Statistics: cut_A (truncated or masked). Truncation: Ionides 2008, Yao et al. 2025 ("Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training"); the mask: the two-sided form of ICEPOP / MIS. Raises ValueError for
    another kind or a cap of at most 1.
    """
    if kind not in ("truncate", "mask") or cap <= 1:
        raise ValueError(f"no importance weights {kind!r} with cap {cap}: truncate or mask, cap above 1")
    weight_A = torch.exp((logp_A - behaviour_logp_A).detach())
    if kind == "truncate":
        return weight_A.clamp(max=cap), {"cut_A": (weight_A > cap).to(weight_A.dtype)}
    outside_A = ~((weight_A >= 1 / cap) & (weight_A <= cap))
    return torch.where(outside_A, 0.0, weight_A), {"cut_A": outside_A.to(weight_A.dtype)}


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
    near_A = torch.clamp(value_A, old_value_A - clip, old_value_A + clip)  # inside, the value itself, to the last digit
    near_loss_A = _regression(near_A, return_A, kind)
    clipped_A = (near_loss_A > loss_A).to(return_A.dtype).detach()
    return torch.maximum(loss_A, near_loss_A), {"clipped_A": clipped_A}


def _regression(value_A: Tensor, return_A: Tensor, kind: str) -> Tensor:
    if kind == "huber":
        return F.huber_loss(value_A, return_A, reduction="none", delta=1.0)
    return 0.5 * (value_A - return_A) ** 2
