"""The mathematics: pure functions of tensors, without configuration or input and output.

Every name listed here is stable: it keeps its meaning and its arguments within a major version.
"""

from upslope.algo.distribution import cut_logprobs, kept_tokens, token_kl
from upslope.algo.kl import AdaptiveKL, AdaptivePenalty, kl_estimate
from upslope.algo.logprobs import token_logprobs
from upslope.algo.losses import (
    cispo_loss,
    clipped_policy_loss,
    importance_weights,
    policy_gradient_loss,
    sequence_clipped_loss,
    surrogate_loss,
    value_loss,
)
from upslope.algo.natural import conjugate_gradient, trust_region_step
from upslope.algo.preference import (
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    orpo_loss,
    simpo_loss,
)
from upslope.algo.reduce import reduce, token_weights
from upslope.algo.returns import best_of_group, discounted_returns, gae, group_advantages, group_deviation
from upslope.algo.stats import RunningMoments, explained_variance, whiten

__all__ = [
    "AdaptiveKL",
    "AdaptivePenalty",
    "RunningMoments",
    "best_of_group",
    "bradley_terry_loss",
    "cispo_loss",
    "clipped_policy_loss",
    "conjugate_gradient",
    "cut_logprobs",
    "discounted_returns",
    "dpo_loss",
    "explained_variance",
    "gae",
    "group_advantages",
    "group_deviation",
    "importance_weights",
    "ipo_loss",
    "kept_tokens",
    "kl_estimate",
    "kto_loss",
    "kto_reference_point",
    "orpo_loss",
    "policy_gradient_loss",
    "reduce",
    "sequence_clipped_loss",
    "simpo_loss",
    "surrogate_loss",
    "token_kl",
    "token_logprobs",
    "token_weights",
    "trust_region_step",
    "value_loss",
    "whiten",
]
