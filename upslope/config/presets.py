"""The table of algorithms: each is a composition of the keys of [rl], and its row holds what sets it apart.

`algorithm = "grpo"` gives the published method; any key that a recipe sets beside it is visibly the user's own. The
first row is the one that the defaults of [rl] describe. What the keys mean stands in rl.py, the functions that they
name in upslope.algo, and where the methods come from in each row's comment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ON_POLICY = {"epochs": 1, "minibatches": 1}  # one optimizer step a rollout: the samples are always the policy's own
GROUP = {
    "samples": 8,
    "prompts": 16,
    "credit": "episode",
    "baseline": "group",
    "scale": "group",
    "reduction": "sequence",
    "kl": 0.0,
    **ON_POLICY,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Schulman et al. 2017 (arXiv 1707.06347) with GAE, the KL to the start in the reward as in InstructGPT (2203.02155)
    "ppo": {},
    # the same paper, section 4: no clip, but a price on KL(old, new) that is led towards a target
    "ppo-kl": {"loss": "surrogate", "trust": {"penalty": 1.0, "target": 0.01}},
    # Schulman et al. 2015 (arXiv 1502.05477): one natural-gradient step a rollout, under a hard KL bound
    "trpo": {
        "update": "trust_region",
        "loss": "surrogate",
        "lam": 0.97,
        "critic": "detached",
        "trust": {"max_kl": 0.01},
    },
    # Mnih et al. 2016 (arXiv 1602.01783): actor-critic, one step on fresh samples, an entropy bonus
    "a2c": {
        "loss": "policy_gradient",
        "lam": 1.0,
        "scale": "none",
        "entropy_weight": 0.01,
        "value_clip": None,
        **ON_POLICY,
    },
    # Williams 1992; the batch's mean return is the baseline unless another is named
    "reinforce": {
        "loss": "policy_gradient",
        "credit": "to_go",
        "baseline": "mean",
        "scale": "none",
        "reduction": "constant",
        **ON_POLICY,
    },
    # Hu 2025 (arXiv 2501.03262): the clip of PPO without its critic; advantages normalised over the whole batch
    "reinforce++": {
        "credit": "to_go",
        "baseline": "none",
        "scale": "batch",
        "kl": 0.01,
        "epochs": 1,
    },
    # Ahmadian et al. 2024 (arXiv 2402.14740): a whole completion is one action, the others of its prompt the baseline
    "rloo": {
        **GROUP,
        "samples": 4,
        "prompts": 32,
        "baseline": "leave_one_out",
        "scale": "none",
        "loss": "policy_gradient",
        "reduction": "constant",
        "kl": 0.05,
    },
    # Shao et al. 2024 (arXiv 2402.03300), outcome supervision: a group's scores, centred and scaled
    "grpo": {**GROUP, "kl": 0.04, "kl_in": "loss", "kl_estimator": "k3"},
    # Liu et al. 2025 (arXiv 2503.20783): neither the length nor the deviation of a group weighs its gradient
    "dr-grpo": {**GROUP, "scale": "none", "reduction": "constant"},
    # Yu et al. 2025 (arXiv 2503.14476): clip-higher, token mean, groups that teach nothing sampled anew, soft limit
    "dapo": {
        **GROUP,
        "reduction": "token",
        "clip_high": 0.28,
        "resample": 3,
        "overlong": 0.2,
        "minibatches": 4,
    },
    # Zheng et al. 2025 (arXiv 2507.18071): one ratio, and one clip, for a whole completion
    "gspo": {**GROUP, "loss": "sequence_clip", "clip_low": 3e-4, "clip_high": 4e-4, "minibatches": 4},
    # MiniMax 2025 (arXiv 2506.13585): every token keeps a gradient, weighed by a ratio that is cut from above
    "cispo": {**GROUP, "loss": "cispo", "clip_high": 4.0, "reduction": "token", "minibatches": 4},
    # Ramamurthy et al. 2022 (arXiv 2210.01241): PPO among the tokens that a slowly moving copy finds likely
    "nlpo": {"top_p": 0.9, "mask_every": 10},
    # Dong et al. 2023 (arXiv 2304.06767): the best of each group are learned as if they were data
    "raft": {**GROUP, "samples": 4, "baseline": "best", "scale": "none", "loss": "policy_gradient"}
    | {"reduction": "token"},
    # Agarwal et al. 2023 (arXiv 2306.13649): the policy's own samples, the teacher's whole distribution at each token
    "gkd": {
        "credit": "episode",
        "baseline": "none",
        "scale": "none",
        "loss": "none",
        "kl": 1.0,
        "kl_in": "loss",
        "kl_estimator": "exact",
        **ON_POLICY,
    },
}
