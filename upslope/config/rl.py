"""The table [rl]: sample, score, improve. An algorithm is a composition of these keys (presets.py names them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from upslope.config.checks import check
from upslope.config.presets import PRESETS
from upslope.config.tables import Above0, Count, Optim, Positive, Rate, Share, Table

AlgorithmName = Literal[
    "ppo",
    "ppo-kl",
    "trpo",
    "a2c",
    "reinforce",
    "reinforce++",
    "rloo",
    "grpo",
    "dr-grpo",
    "dapo",
    "gspo",
    "cispo",
    "nlpo",
    "raft",
    "gkd",
]


class Trust(Table):
    """How far one rollout may lead the policy: KL(old, new), mean over action tokens, in nats."""

    max_kl: Above0 | None = None  # trust_region: the bound of a step; gradient: no further epoch or minibatch beyond
    penalty: Rate = 0.0  # coefficient of KL(old, new) in the loss
    target: Above0 | None = None  # leads the penalty: doubled above 1.5 targets, halved below 1 / 1.5
    damping: Above0 = 0.1  # trust_region: added to the Fisher matrix's diagonal
    cg_steps: Positive = 10  # trust_region: of the conjugate gradient
    backtracks: Positive = 10  # trust_region: halvings of a step before it is given up


class RL(Table):
    """Policy-gradient training. The defaults are PPO's; another algorithm's row changes them before the recipe does.

    A table [rl.NAME] of a recipe holds what it wants of that algorithm only, so that one word changes the algorithm: it
    stands above [rl], and what the command line says above both (load.py).
    """

    init: str | None = None
    algorithm: AlgorithmName = "ppo"
    reward: str | dict[str, float] | None = None  # "stage:reward", "module:function" or "file.py:function"; or weights
    teacher: str | None = None  # gkd: the model to learn from, of the same vocabulary
    steps: Positive = 100  # rollouts
    prompts: Positive = 64  # prompts per rollout
    samples: Positive = 1  # completions per prompt
    epochs: Positive = 2  # passes over each rollout
    minibatches: Positive = 4  # optimizer steps per pass
    # sampling
    max_tokens: Positive = 64  # of a completion
    temperature: Above0 = 1.0
    top_k: Count = 0  # 0: all; a cut is kept, and renormalised, in training: see mask_every
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    mask_every: Count = 0  # rollouts between renewals of the copy of the policy that top_k and top_p are read from
    stop: tuple[str, ...] = ()
    resample: Count = 0  # rounds of new prompts in the place of groups whose scores are all equal
    overlong: Share = 0.0  # last share of max_tokens over which a price grows from 0 to 1, the price of being cut
    # advantages
    credit: Literal["gae", "to_go", "episode"] = "gae"  # gae; the return from each action on; one for all
    baseline: Literal["critic", "mean", "running", "group", "leave_one_out", "best", "none"] = "critic"
    scale: Literal["batch", "group", "none"] = "batch"  # advantages: to mean 0 and deviation 1 over a rollout's actions
    gamma: Share = 1.0
    lam: Share = 0.95
    reward_norm: Literal["none", "running"] = "none"  # scores over the deviation of all seen so far; no shift
    # the policy's loss
    update: Literal["gradient", "trust_region"] = "gradient"  # trust_region: one step; epochs are then the critic's
    loss: Literal["clip", "surrogate", "policy_gradient", "sequence_clip", "cispo", "none"] = "clip"
    reduction: Literal["token", "sequence", "constant"] = "token"  # over tokens; of sequences' means; / max_tokens
    clip_low: Above0 = 0.2
    clip_high: Above0 = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    entropy_weight: Rate = 0.0
    trust: Trust = Trust()
    importance: Literal["none", "truncate", "mask"] = "none"  # weights old / sampler, for a sampler of other numerics
    importance_cap: Annotated[float, Field(gt=1)] = 2.0
    # the critic
    critic: Literal["none", "shared", "detached", "separate"] = "shared"
    critic_lr: Above0 | None = None  # of what the critic has of its own, on optim's schedule; unset: optim.lr
    value_weight: Rate = 0.1
    value_loss: Literal["squared", "huber"] = "squared"
    value_clip: Above0 | None = 0.2
    # the distance to the start
    kl: Rate = 0.05  # coefficient
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    kl_target: Above0 | None = None  # nats per completion: adapts the coefficient
    kl_horizon: Positive = 10_000
    # rewards
    best_by: str | None = None  # task/reward or task/METRIC, measured every eval.every: the best is handed on
    patience: Positive | None = None  # measurements in a row without a better one, after which the stage ends
    limit: Literal["score", "bootstrap"] = "score"  # a completion cut by max_tokens: its score, or the critic's value
    freeze_layers: Count = 0
    optim: Optim = Optim()

    @property
    def episodes(self) -> int:
        return self.prompts * self.samples

    @property
    def rewards(self) -> dict[str, float]:
        if self.reward is None:
            return {}
        return {self.reward: 1.0} if isinstance(self.reward, str) else dict(self.reward)

    @property
    def uses_critic(self) -> bool:
        return self.credit == "gae" or self.baseline == "critic" or self.limit == "bootstrap"

    @property
    def compares_groups(self) -> bool:
        return self.baseline in ("group", "leave_one_out", "best") or self.scale == "group"

    @property
    def scores_once(self) -> bool:
        """Whether a rollout is used for one gradient step by a policy that is compared with nothing but itself: the
        log-probabilities of that step are then those of the weights that sampled, and no pass before it is needed."""
        alone = self.critic == "none" and not self.uses_reference and self.importance == "none" and not self.mask_every
        once = self.update == "gradient" and self.epochs * self.minibatches == 1 and self.trust.target is None
        return alone and once

    @property
    def uses_reference(self) -> bool:
        return self.kl > 0

    @model_validator(mode="before")
    @classmethod
    def _algorithm_first(cls, raw: Any) -> Any:
        """The algorithm's row under what the recipe says; a critic where the result needs one and none is named."""
        if not isinstance(raw, Mapping):
            return raw
        preset = PRESETS.get(str(raw.get("algorithm", "ppo")), {})
        merged = {**preset, **raw}
        if isinstance(raw.get("trust"), Mapping):
            merged["trust"] = {**preset.get("trust", {}), **raw["trust"]}
        if merged.get("kl_in") == "loss" and "kl_estimator" not in merged:
            merged["kl_estimator"] = "k2"  # on-policy its gradient is the KL's own
        if "critic" not in merged:
            fields = cls.model_fields
            chosen = {key: merged.get(key, fields[key].default) for key in ("credit", "baseline", "limit")}
            if chosen["credit"] != "gae" and chosen["baseline"] != "critic" and chosen["limit"] != "bootstrap":
                merged["critic"] = "none"
        return merged

    @model_validator(mode="after")
    def _can_be(self) -> RL:
        check(self)
        return self
