"""Combinations of [rl] that cannot be right, each refused with its reason and its remedy, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from upslope.config.presets import PRESETS

if TYPE_CHECKING:
    from upslope.config.rl import RL

GROUP_BASELINES = ("group", "leave_one_out", "best")


def check(rl: RL) -> None:
    """Raise ValueError "what is wrong: what to change" for the first that is found."""
    for rules in (_arithmetic, _credit, _critic, _loss, _trust, _sampling, _distance, _unused):
        for problem in rules(rl):
            raise ValueError(problem)


def _arithmetic(rl: RL) -> Iterator[str]:
    if rl.episodes % rl.minibatches:
        fits = [m for m in range(1, rl.episodes + 1) if rl.episodes % m == 0]
        near = min(fits, key=lambda m: abs(m - rl.minibatches))
        yield (
            f"{rl.prompts} prompts x {rl.samples} samples = {rl.episodes} episodes do not divide into "
            f"{rl.minibatches} minibatches: set minibatches = {near}"
        )
    if rl.algorithm == "gkd":
        if not rl.teacher:
            yield "gkd has no teacher: set teacher to a model of the same vocabulary"
    elif rl.teacher:
        yield f"teacher has no place in {rl.algorithm}, only gkd learns from one: remove it or set algorithm = gkd"
    elif not rl.rewards:
        yield "reward is missing or empty: name a function or stage:reward"


def _credit(rl: RL) -> Iterator[str]:
    if rl.credit == "gae" and rl.baseline != "critic":
        yield (
            f"credit = gae reads a critic's values, not baseline = {rl.baseline}: set baseline = critic, or "
            "credit = to_go or episode"
        )
    if rl.compares_groups and rl.samples < 2:
        key = "baseline" if rl.baseline in GROUP_BASELINES else "scale"
        yield (
            f"{key} = {getattr(rl, key)} compares the samples of a prompt and there is one (samples = {rl.samples}), "
            "whose advantage would always be 0: set samples to 2 or more"
        )
    if rl.scale == "group" and rl.baseline not in ("group", "leave_one_out"):
        yield f"scale = group needs a group's baseline, not {rl.baseline}: set baseline = group, or scale = batch"
    if rl.credit == "episode" and rl.gamma != 1:
        yield f"gamma = {rl.gamma:g} discounts nothing where an episode is one action: set gamma = 1 or credit = to_go"
    if rl.baseline == "best" and rl.credit != "episode":
        yield f"baseline = best chooses whole episodes, not credit = {rl.credit}: set credit = episode"
    if rl.baseline == "best" and rl.scale != "none":
        yield f"baseline = best with scale = {rl.scale} would push the others down without a bound: set scale = none"
    if rl.baseline == "best" and rl.loss != "policy_gradient":
        yield f"baseline = best learns by likelihood, not loss = {rl.loss}: set loss = policy_gradient"
    if rl.resample and rl.samples < 2:
        yield f"resample = {rl.resample} looks for groups and samples = {rl.samples}: set samples to 2 or more"


def _critic(rl: RL) -> Iterator[str]:
    if rl.uses_critic and rl.critic == "none":
        asks = "credit = gae" if rl.credit == "gae" else "baseline = critic"
        asks = asks if rl.credit == "gae" or rl.baseline == "critic" else "limit = bootstrap"
        yield f"{asks} asks a critic and critic = none: set critic = shared, detached or separate"
    if rl.uses_critic and rl.value_weight == 0 and rl.update == "gradient":
        yield "value_weight = 0 never trains the critic that credit asks: set it above 0"
    if rl.overlong and rl.limit == "bootstrap":
        yield "overlong prices a cut that limit = bootstrap does not pay for: set overlong = 0 or limit = score"
    if not rl.uses_critic and rl.critic != "none":
        yield f"critic = {rl.critic} would be trained and never asked: set critic = none, or credit = gae"


def _loss(rl: RL) -> Iterator[str]:
    steps = rl.epochs * rl.minibatches
    if rl.loss == "policy_gradient" and rl.baseline != "best" and steps > 1:
        yield (
            f"loss = policy_gradient holds for the policy's own samples and {steps} optimizer steps a rollout leave "
            "them behind: set epochs = 1 and minibatches = 1, or loss = clip"
        )
    if rl.loss == "none" and not (rl.kl and rl.kl_in == "loss"):
        yield "loss = none leaves nothing to learn: set kl above 0 and kl_in = loss"
    if rl.clip_low > 1:
        yield f"clip_low = {rl.clip_low:g} bounds a ratio below 0, where it never is: set at most 1"


def _trust(rl: RL) -> Iterator[str]:
    trust = rl.trust
    if rl.update == "trust_region":
        if trust.max_kl is None:
            yield "update = trust_region has no bound: set trust.max_kl, 0.01 for instance"
        if rl.critic == "shared":
            yield (
                "update = trust_region with critic = shared: the critic's steps would move the policy past its bound; "
                "set critic = detached or separate"
            )
        if rl.loss != "surrogate":
            yield f"update = trust_region improves loss = surrogate, not {rl.loss}: set loss = surrogate"
        if trust.penalty or rl.kl_in == "loss" or rl.entropy_weight:
            yield "update = trust_region has no other terms: set trust.penalty and entropy_weight to 0, kl_in = reward"
    elif rl.loss == "surrogate" and rl.epochs * rl.minibatches > 1 and not trust.penalty and trust.max_kl is None:
        yield "loss = surrogate is unbounded over several steps: set trust.penalty or trust.max_kl, or loss = clip"
    for key in ("target", "max_kl"):
        single = rl.update == "gradient" and rl.epochs * rl.minibatches == 1
        if single and getattr(trust, key) is not None:
            yield f"trust.{key} bounds what several optimizer steps drift and there is one a rollout: remove it"
    if trust.target is not None and not trust.penalty:
        yield "trust.target leads a penalty that is 0: set trust.penalty above 0"


def _sampling(rl: RL) -> Iterator[str]:
    cut = rl.top_p < 1 or rl.top_k > 0
    if cut and not rl.mask_every:
        key = f"top_p = {rl.top_p:g}" if rl.top_p < 1 else f"top_k = {rl.top_k}"
        yield (
            f"{key} samples from a cut distribution that the ratio would not know: set mask_every = 1, which keeps "
            "the cut and renormalises in training, or top_p = 1 and top_k = 0"
        )
    if rl.mask_every and not cut:
        yield f"mask_every = {rl.mask_every} and nothing is cut: set top_p below 1 or top_k above 0"
    if cut and rl.update == "trust_region":
        yield "update = trust_region with a cut distribution is not there: set top_p = 1, top_k = 0, mask_every = 0"
    if cut and rl.kl_in == "loss" and rl.kl_estimator == "exact":
        yield "kl_estimator = exact with a cut distribution is not there: set kl_estimator = k3, or top_p = 1"


def _distance(rl: RL) -> Iterator[str]:
    if rl.kl and rl.kl_in == "loss" and rl.kl_estimator == "k1":
        yield (
            "kl_estimator = k1 in the loss has a gradient of mean 0 and holds nothing: set kl_estimator = k2, k3 or "
            "exact, or kl_in = reward"
        )
    if rl.kl and rl.kl_in == "reward" and rl.kl_estimator != "k1":
        yield (
            f"kl_estimator = {rl.kl_estimator} in the reward leads to another point than the KL's own: set "
            "kl_estimator = k1, or kl_in = loss"
        )
    if rl.kl_target is not None and not rl.kl:
        yield "kl_target adapts a coefficient that is 0: set kl above 0"
    if rl.kl_target is not None and rl.episodes >= 5 * rl.kl_horizon:
        yield (
            f"kl_horizon = {rl.kl_horizon} is too short for {rl.episodes} episodes a rollout, one could turn the "
            f"coefficient negative: set it above {rl.episodes // 5}"
        )


def _unused(rl: RL) -> Iterator[str]:
    """A key that was set and has no effect; one that stands at its default is left alone."""
    no_critic = rl.critic == "none"
    for key, idle, because in (
        ("lam", rl.credit != "gae", f"credit = {rl.credit}"),
        ("critic_lr", no_critic, "critic = none"),
        ("value_weight", no_critic, "critic = none"),
        ("value_loss", no_critic, "critic = none"),
        ("value_clip", no_critic, "critic = none"),
        ("dual_clip", rl.loss != "clip", f"loss = {rl.loss}"),
        ("clip_low", rl.loss not in ("clip", "sequence_clip"), f"loss = {rl.loss}"),
        ("clip_high", rl.loss not in ("clip", "sequence_clip", "cispo"), f"loss = {rl.loss}"),
        ("kl_horizon", rl.kl_target is None, "no kl_target"),
        ("importance_cap", rl.importance == "none", "importance = none"),
        ("importance", rl.loss == "none", "loss = none"),
        ("importance", rl.update == "trust_region", "update = trust_region"),
        ("value_weight", rl.update == "trust_region", "update = trust_region, whose critic learns by itself"),
    ):
        default = type(rl).model_fields[key].default
        if idle and getattr(rl, key) not in (default, None, PRESETS[rl.algorithm].get(key)):
            yield f"{key} = {getattr(rl, key)!r} has no effect with {because}: remove it"
    for key in ("damping", "cg_steps", "backtracks"):
        default = type(rl.trust).model_fields[key].default
        if rl.update == "gradient" and getattr(rl.trust, key) != default:
            yield f"trust.{key} = {getattr(rl.trust, key)!r} has no effect with update = gradient: remove it"
