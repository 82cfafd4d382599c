"""The mathematics: pure functions of tensors, without configuration or input and output.

Every name listed here is stable: it keeps its meaning and its arguments within a major version.
"""

from upslope.algo.kl import AdaptiveKL, kl_estimate
from upslope.algo.logprobs import token_logprobs
from upslope.algo.losses import bradley_terry_loss, clipped_policy_loss, policy_gradient_loss, value_loss
from upslope.algo.reduce import reduce
from upslope.algo.returns import discounted_returns, gae, group_advantages
from upslope.algo.stats import explained_variance, whiten

__all__ = [
    "AdaptiveKL",
    "bradley_terry_loss",
    "clipped_policy_loss",
    "discounted_returns",
    "explained_variance",
    "gae",
    "group_advantages",
    "kl_estimate",
    "policy_gradient_loss",
    "reduce",
    "token_logprobs",
    "value_loss",
    "whiten",
]
