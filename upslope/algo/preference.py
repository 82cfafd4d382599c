"""Losses on preference pairs: one value per pair (kto: per example), not reduced, with detached statistics beside them.

Every one of them compares implicit rewards, which stand in its statistics: correct_B (1 where the chosen one's is
higher, 0 where lower, 1/2 where equal), margin_B (the gap), chosen_reward_B, rejected_reward_B. A log-probability of a
side is that of its completion: the sum over its tokens where the docstring says log pi(y), the mean where it says
log pi(y) / |y|. The caller divides sums by denominators of the whole optimizer batch (reduce.py).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Stats = dict[str, Tensor]


def bradley_terry_loss(
    chosen_B: Float[Tensor, " B"],
    rejected_B: Float[Tensor, " B"],
    *,
    margin_B: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, " B"], Stats]:
    """Minus the log-likelihood that the chosen one of each pair wins.

        L = -log sigmoid(s_chosen - s_rejected - margin)

    Bradley and Terry 1952; margins: Touvron et al. 2023 (arXiv 2307.09288).
    """
    gap_B = chosen_B - rejected_B
    return -F.logsigmoid(gap_B if margin_B is None else gap_B - margin_B), _pair_stats(chosen_B, rejected_B)


def dpo_loss(
    chosen_logp_B: Float[Tensor, " B"],
    rejected_logp_B: Float[Tensor, " B"],
    ref_chosen_logp_B: Float[Tensor, " B"],
    ref_rejected_logp_B: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin_B: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, " B"], Stats]:
    """Bradley-Terry on the rewards for which the policy would be the optimum under a KL price beta.

        r(y) = beta (log pi(y) - log pi_ref(y)),   g = r(chosen) - r(rejected) - margin
        L = -(1 - e) log sigmoid(g) - e log sigmoid(-g),   e = label_smoothing

    Rafailov et al. 2023, eq. 7 (arXiv 2305.18290). e, the share of pairs taken to be the wrong way round, follows
    Mitchell 2023, "A note on DPO with noisy preferences"; margins: Amini et al. 2024 (arXiv 2402.10571). Raises
    ValueError for a beta that is not positive or an e outside [0, 1/2).
    """
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5): {label_smoothing}")
    chosen_B = beta * (chosen_logp_B - ref_chosen_logp_B.detach())
    rejected_B = beta * (rejected_logp_B - ref_rejected_logp_B.detach())
    loss_B, stats = bradley_terry_loss(chosen_B, rejected_B, margin_B=margin_B)
    if label_smoothing:
        opposite_B = bradley_terry_loss(rejected_B, chosen_B, margin_B=None if margin_B is None else -margin_B)[0]
        loss_B = (1 - label_smoothing) * loss_B + label_smoothing * opposite_B
    return loss_B, stats


def ipo_loss(
    chosen_logp_B: Float[Tensor, " B"],
    rejected_logp_B: Float[Tensor, " B"],
    ref_chosen_logp_B: Float[Tensor, " B"],
    ref_rejected_logp_B: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> tuple[Float[Tensor, " B"], Stats]:
    """A regression of the gap in log-ratios on 1 / (2 beta), so that no pair is ever pushed without end.

        h = log pi(y_c) / pi_ref(y_c) / |y_c| - log pi(y_r) / pi_ref(y_r) / |y_r|,   L = (h - 1 / (2 beta))^2

    Azar et al. 2023, eq. 17 (arXiv 2310.12036), whose tau is beta; its rewards are beta times the log-ratios, so that
    the margin of its optimum is 1/2. Departure: the equation has whole log-probabilities; means per token, which its
    authors recommended afterwards, make one target fit pairs of all lengths. Raises ValueError for a beta that is
    not positive.
    """
    _check_beta(beta)
    chosen_B = chosen_logp_B - ref_chosen_logp_B.detach()
    rejected_B = rejected_logp_B - ref_rejected_logp_B.detach()
    return (chosen_B - rejected_B - 0.5 / beta) ** 2, _pair_stats(beta * chosen_B, beta * rejected_B)


def simpo_loss(
    chosen_logp_B: Float[Tensor, " B"],
    rejected_logp_B: Float[Tensor, " B"],
    *,
    beta: float = 2.0,
    margin: float = 0.5,
) -> tuple[Float[Tensor, " B"], Stats]:
    """Bradley-Terry on log-probabilities per token, without a reference, above a target margin.

        r(y) = beta log pi(y) / |y|,   L = -log sigmoid(r(chosen) - r(rejected) - beta margin)

    Meng et al. 2024, eq. 6 (arXiv 2405.14734). margin is in nats per token, before beta: the paper's gamma / beta,
    0.5 for its beta of 2 and gamma of 1. Raises ValueError for a beta that is not positive.
    """
    _check_beta(beta)
    chosen_B, rejected_B = beta * chosen_logp_B, beta * rejected_logp_B
    target_B = torch.full_like(chosen_B, beta * margin)
    return bradley_terry_loss(chosen_B, rejected_B, margin_B=target_B)


def orpo_loss(
    chosen_logp_B: Float[Tensor, " B"], rejected_logp_B: Float[Tensor, " B"], *, beta: float = 0.1
) -> tuple[Float[Tensor, " B"], Stats]:
    """The odds-ratio term that stands beside the likelihood of the chosen side, which the caller adds.

        r(y) = log(p / (1 - p)),   log p = log pi(y) / |y|,   L = -beta log sigmoid(r(chosen) - r(rejected))

    Hong et al. 2024, eq. 6 and 7 (arXiv 2403.07691), whose lambda is beta. A p nearer to 1 than the dtype tells apart
    counts as the nearest that it does, without a gradient. Raises ValueError for a beta that is not positive.
    """
    _check_beta(beta)
    loss_B, stats = bradley_terry_loss(_log_odds(chosen_logp_B), _log_odds(rejected_logp_B))
    return beta * loss_B, stats


def kto_loss(
    logp_B: Float[Tensor, " B"],
    ref_logp_B: Float[Tensor, " B"],
    desirable_B: Bool[Tensor, " B"],
    reference_point: Float[Tensor, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Tensor, " B"], Stats]:
    """Minus the value that prospect theory gives an example, desirable or not, against a reference point z0.

        d = beta (log pi(y) - log pi_ref(y) - z0)
        L = desirable_weight (1 - sigmoid(d))   or   undesirable_weight (1 - sigmoid(-d))

    Ethayarajh et al. 2024 (arXiv 2402.01306); z0 comes from `kto_reference_point` and gets no gradient. Examples
    need no partner, so the statistics are reward_B = beta (log pi - log pi_ref), margin_B (d, or -d where undesirable)
    and correct_B (its sign). Raises ValueError for a beta that is not positive.
    """
    _check_beta(beta)
    reward_B = beta * (logp_B - ref_logp_B.detach())
    gap_B = reward_B - beta * reference_point.detach()
    margin_B = torch.where(desirable_B, gap_B, -gap_B)
    weight_B = torch.where(desirable_B, desirable_weight, undesirable_weight).to(gap_B.dtype)
    stats = {"reward_B": reward_B.detach(), "margin_B": margin_B.detach(), "correct_B": _correct(margin_B)}
    return weight_B * torch.sigmoid(-margin_B), stats


def kto_reference_point(logp_M: Float[Tensor, " M"], ref_logp_M: Float[Tensor, " M"]) -> Float[Tensor, ""]:
    """How far the policy has gone from the reference: z0 of KTO, from M mismatched examples, detached.

        z0 = max(0, mean_i log pi(y_j | x_i) / pi_ref(y_j | x_i)),   j not i

    Ethayarajh et al. 2024, section 4 (arXiv 2402.01306): a biased estimate of KL(pi, pi_ref) that needs no samples.
    Departure: it is of the whole optimizer batch, not of a micro-batch.
    """
    return (logp_M - ref_logp_M).mean().clamp(min=0).detach()


def _pair_stats(chosen_B: Tensor, rejected_B: Tensor) -> Stats:
    chosen_B, rejected_B = chosen_B.detach(), rejected_B.detach()
    gap_B = chosen_B - rejected_B
    return {
        "correct_B": _correct(gap_B),
        "margin_B": gap_B,
        "chosen_reward_B": chosen_B,
        "rejected_reward_B": rejected_B,
    }


def _correct(margin_B: Tensor) -> Tensor:
    return 0.5 * (margin_B.detach().sign() + 1)


def _log_odds(logp_B: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p; 1 - p by expm1 where p is large and by log1p where it is small."""
    logp_B = logp_B.clamp(max=-torch.finfo(logp_B.dtype).eps)
    large_B = logp_B > -0.7
    log_rest_B = torch.where(
        large_B,
        torch.log(-torch.expm1(torch.where(large_B, logp_B, -1.0))),
        torch.log1p(-torch.exp(torch.where(large_B, -1.0, logp_B))),
    )
    return logp_B - log_rest_B


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be positive: {beta}")
