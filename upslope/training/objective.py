"""What one optimizer step of RL improves: the policy's loss and what is added to it, over any micro-batches.

    loss = policy + value_weight value - entropy_weight entropy + kl KL(policy, reference) + penalty KL(old, policy)

Every term is a sum over action tokens of weight_A times the term, and the weights (rl.reduction) are those of the
whole minibatch: how it is cut into micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upslope.algo import importance_weights, kl_estimate, reduce, token_kl, token_weights, value_loss
from upslope.config import RL
from upslope.models.heads import ActorCritic, TokenScores
from upslope.models.trunk import Trunk
from upslope.ragged import Ragged, send
from upslope.training.algorithms import POLICY_LOSSES
from upslope.training.episode import action_starts, episode_parts, lay_out
from upslope.training.rollout import Batch, Frozen, Scored
from upslope.training.run import Run
from upslope.training.state import RunState
from upslope.training.update import Stats, optimizer_step, stop_if


@dataclass(frozen=True)
class Prices:
    """Coefficients that controllers lead: of KL(policy, reference) and of KL(old, policy), both in the loss."""

    kl: float = 0.0
    trust: float = 0.0


@dataclass(frozen=True)
class Part:
    """A micro-batch: the episodes as the model reads them, their rows of the batch, and their share of every mean."""

    ragged: Ragged
    action_A: Tensor
    starts: Tensor
    rows: Tensor
    weight_A: Tensor


def minibatch_step(
    run: Run,
    rl: RL,
    state: RunState,
    batch: Batch,
    members: Sequence[int],
    lr: float,
    frozen: Frozen,
    prices: Prices,
) -> dict[str, float]:
    """One optimizer step on some episodes of a batch; statistics are means over the minibatch's action tokens."""
    model = state.model
    assert isinstance(model, ActorCritic)
    tokens = len(batch.rows(members))
    once, scored = frozen.scored_once(rl), Scored()

    def loss_of(part: Part) -> tuple[Tensor, Stats]:
        scores = model.evaluate(part.ragged, part.action_A, temperature=rl.temperature, cut=frozen.cut(rl))
        if once:
            scored.add(part.rows, scores)
        losses, stats = terms(rl, model, batch, part, scores, frozen, prices, tokens)
        return torch.stack(list(losses.values())).sum(), stats

    metrics = _step(run, rl, state, batch, members, lr, loss_of)
    if once:
        rows, logp_A, entropy_A, _ = scored.together()
        batch.old_logp_A[rows] = batch.ref_logp_A[rows] = logp_A
        batch.entropy_A[rows] = entropy_A
    return metrics


def critic_step(run: Run, rl: RL, state: RunState, batch: Batch, members: Sequence[int], lr: float) -> dict[str, float]:
    """One optimizer step of the critic alone, as a trust region needs it: the policy does not move."""
    model = state.model
    assert isinstance(model, ActorCritic)
    tokens = len(batch.rows(members))

    def loss_of(part: Part) -> tuple[Tensor, Stats]:
        value_A = model.values(part.ragged, part.action_A)
        losses = {"value": (part.weight_A * _value_loss(rl, batch, part, value_A)).sum()}
        return losses["value"], means(losses, {}, tokens)

    return _step(run, rl, state, batch, members, lr, loss_of)


@torch.no_grad()
def drift(rl: RL, model: ActorCritic, batch: Batch, frozen: Frozen, should_stop: Callable[[], bool]) -> float:
    """KL(old, policy) at the present parameters, mean over the batch's action tokens. Raises StopAsked."""
    total = 0.0
    for part in minibatch_parts(rl, batch, range(len(batch.episodes)), model.policy):
        stop_if(should_stop)
        scores = model.evaluate(part.ragged, part.action_A, temperature=rl.temperature, cut=frozen.cut(rl))
        old_logp_A = send(batch.old_logp_A[part.rows], scores.logp_A.device)
        total += float(kl_estimate(old_logp_A, scores.logp_A, "k3").sum())
    return total / len(batch.old_logp_A)


def _step(
    run: Run,
    rl: RL,
    state: RunState,
    batch: Batch,
    members: Sequence[int],
    lr: float,
    loss_of: Callable[[Part], tuple[Tensor, Stats]],
) -> dict[str, float]:
    assert isinstance(state.model, ActorCritic)
    return optimizer_step(
        state.model,
        state.optimizer,
        minibatch_parts(rl, batch, members, state.model.policy),
        loss_of,
        lr=lr,
        clip_norm=rl.optim.clip_norm,
        should_stop=run.should_stop,
    )


def minibatch_parts(rl: RL, batch: Batch, members: Sequence[int], policy: Trunk) -> Iterator[Part]:
    """Micro-batches of the members as the policy reads them, with weights made over all of them together."""
    device = policy.device
    episodes = [batch.episodes[e] for e in members]
    whole = action_starts(episodes)
    weight_A = token_weights(whole, rl.reduction, limit=rl.max_tokens)
    for places in episode_parts(episodes, rl.optim.micro_tokens):
        chosen = [episodes[i] for i in places]
        ragged, action_A = lay_out(chosen, policy.needs_source)
        own = torch.cat([torch.arange(int(whole[i]), int(whole[i + 1])) for i in places])
        rows = batch.rows([members[i] for i in places])
        yield Part(ragged.to(device), action_A, send(action_starts(chosen), device), rows, send(weight_A[own], device))


def terms(
    rl: RL,
    model: ActorCritic,
    batch: Batch,
    part: Part,
    scores: TokenScores,
    frozen: Frozen,
    prices: Prices,
    tokens: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weighted terms of a micro-batch, whose sum is its loss, and its shares of the statistics."""
    device, weight_A = scores.logp_A.device, part.weight_A
    own = frozen.scored_once(rl)  # these weights have sampled: their log-probabilities are the old ones
    old_logp_A = scores.logp_A.detach().float() if own else send(batch.old_logp_A[part.rows], device)
    advantage_A = send(batch.advantage_A[part.rows], device)
    policy_A, found = POLICY_LOSSES[rl.loss](rl, scores.logp_A, old_logp_A, advantage_A, part.starts)
    stats = {name: value for name, value in found.items() if name == "clipped_A"}
    if rl.importance != "none":
        behaviour_A = send(batch.behaviour_logp_A[part.rows], device)
        correction_A, cut = importance_weights(old_logp_A, behaviour_A, kind=rl.importance, cap=rl.importance_cap)
        policy_A = policy_A * correction_A
        stats["importance_cut_A"] = cut["cut_A"]
    losses = {"policy": (weight_A * policy_A).sum()}
    if scores.value_A is not None and rl.value_weight:
        losses["value"] = rl.value_weight * (weight_A * _value_loss(rl, batch, part, scores.value_A)).sum()
    if rl.entropy_weight:
        losses["entropy"] = -rl.entropy_weight * (weight_A * scores.entropy_A).sum()
    if rl.kl_in == "loss" and prices.kl and frozen.reference is not None:
        kl_A = reference_kl(rl, model, batch, part, scores, frozen)
        losses["kl"] = prices.kl * (weight_A * kl_A).sum()
        stats["kl_A"] = kl_A.detach()
    drift_A = kl_estimate(old_logp_A, scores.logp_A, "k3")  # sampled from old: KL(old, policy) and its own gradient
    if prices.trust:
        losses["trust"] = prices.trust * (weight_A * drift_A).sum()
    stats["approx_kl_A"] = drift_A.detach()
    stats["ratio_gap_A"] = torch.expm1(scores.logp_A.detach() - old_logp_A).abs()
    return losses, means(losses, stats, tokens)


def reference_kl(rl: RL, model: ActorCritic, batch: Batch, part: Part, scores: TokenScores, frozen: Frozen) -> Tensor:
    """kl_A to the reference as rl.kl_estimator says: from the sampled token, or over the whole vocabulary."""
    if rl.kl_estimator != "exact":
        return kl_estimate(scores.logp_A, send(batch.ref_logp_A[part.rows], scores.logp_A.device), rl.kl_estimator)
    assert frozen.reference is not None
    state_A = send(part.ragged.previous[part.action_A], model.policy.device)
    with torch.no_grad():
        reference_AD = frozen.reference.hidden(part.ragged)[state_A]
    return token_kl(
        scores.hidden_AD,
        model.policy.output_weight,
        reference_AD,
        frozen.reference.output_weight,
        temperature=rl.temperature,
    )


def means(losses: Mapping[str, Tensor], stats: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """A micro-batch's shares of the step's statistics: loss/NAME as it enters the loss, policy/NAME over tokens."""
    shares = {f"loss/{name}": value for name, value in losses.items()}
    return shares | {f"policy/{n.removesuffix('_A')}": reduce(value.float(), tokens) for n, value in stats.items()}


def _value_loss(rl: RL, batch: Batch, part: Part, value_A: Tensor) -> Tensor:
    device = value_A.device
    loss_A, _ = value_loss(
        value_A,
        send(batch.return_A[part.rows], device),
        kind=rl.value_loss,
        old_value_A=send(batch.value_A[part.rows], device),
        clip=rl.value_clip,
    )
    return loss_A
