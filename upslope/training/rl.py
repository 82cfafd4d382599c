"""The RL loop: generate, score, prepare, update; blind to the algorithm's name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upslope.algo import AdaptiveKL, explained_variance, reduce, value_loss
from upslope.algo.random import permutation
from upslope.config import RL
from upslope.engine import Engine
from upslope.errors import Interrupted, RunError
from upslope.models.decoder import Decoder
from upslope.models.heads import ActorCritic
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.algorithms import ALGORITHMS
from upslope.training.batches import batch_indices, micro_batches
from upslope.training.episode import Episode, lay_out
from upslope.training.export import export_policy
from upslope.training.pending import batch_from_tensors, batch_to_tensors
from upslope.training.rollout import Batch, collect, prepare, rollout_metrics
from upslope.training.run import Run, peak_memory_gb
from upslope.training.scoring import Scorer
from upslope.training.state import RunState, freeze_lowest
from upslope.training.update import Stats, StopAsked, learning_rate, make_optimizer, optimizer_step

GAP_ALARM = 0.1  # nats, mean over tokens: sampler and trainer no longer hold the same policy
RATIO_ALARM = 0.05  # mean |ratio - 1| on the first minibatch, where it is 1 but for rounding


@dataclass
class Actors:
    """Who takes part: the trained policy with its critic, the frozen reference, the engine, the rewards."""

    model: ActorCritic
    reference: Decoder | None
    engine: Engine
    scorer: Scorer
    tokenizer: Tokenizer


def run_rl(run: Run, rl: RL, actors: Actors, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Climb the reward for rl.steps rollouts, write rl/model. Raises Interrupted after saving when asked to stop."""
    model = actors.model
    freeze_lowest(model.policy, rl.freeze_layers)
    state = RunState("rl", model, make_optimizer(model, rl.optim))
    controller = AdaptiveKL(target=rl.kl_target, horizon=rl.kl_horizon if rl.kl_target else None, coefficient=rl.kl)
    if state.restore(run):
        controller.restore(state.extra["kl"])
    state.extra["kl"] = controller.state()
    try:
        while state.rollout < rl.steps:
            episodes, batch, metrics = next_rollout(run, rl, actors, prompts, state, controller)
            metrics |= improve(run, rl, state, batch)
            finish_rollout(run, rl, actors, state, controller, episodes, batch, metrics)
            state.save_if_due(run)
    except (StopAsked, Interrupted):
        state.interrupt(run)
    export_policy(run, "rl", model, actors.tokenizer)
    return state.finish(run, {"memory/peak_gb": peak_memory_gb()})


def next_rollout(
    run: Run, rl: RL, actors: Actors, prompts: Sequence[Prompt], state: RunState, controller: AdaptiveKL
) -> tuple[list[Episode], Batch, dict[str, float]]:
    """The rollout to learn from: the half-used one of a resumed run, or a new one."""
    if state.pending is not None:
        episodes, batch, metrics = batch_from_tensors(state.pending, state.extra["pending"])
        return episodes, batch, metrics
    number = state.rollout
    chosen = batch_indices(len(prompts), rl.prompts, number, run.recipe.seed, "prompts")
    run.progress("rl", number, rl.steps, "generate")
    start = time.perf_counter()
    actors.engine.load(actors.model.policy, version=number)
    keys = [number * rl.prompts + i for i in range(rl.prompts)]
    episodes = collect(
        run, actors.engine, actors.tokenizer, [prompts[i] for i in chosen], keys, actors.scorer, rl, step=number
    )
    collected = time.perf_counter()
    run.progress("rl", number + 0.2, rl.steps, "log-probabilities")
    kept = [e for e in episodes if e.total is not None]
    algorithm = ALGORITHMS[rl.algorithm]
    batch = prepare(kept, actors.model, actors.reference, algorithm, rl, controller.coefficient)
    metrics = rollout_metrics(episodes, batch) | {"kl/coefficient": controller.coefficient}
    metrics["critic/explained_variance"] = explained_variance(batch.value_A, batch.return_A)
    metrics["time/rollout_s"] = collected - start
    metrics["time/prepare_s"] = time.perf_counter() - collected
    metrics["tokens/sampled"] = float(len(batch.old_logp_A))
    if metrics["policy/sampler_gap_mean"] > GAP_ALARM:
        message = f"sampler and trainer differ by {metrics['policy/sampler_gap_mean']:.3f} nats a token"
        run.record("alarm", stage="rl", step=number, message=message)
    state.pending, state.extra["pending"] = batch_to_tensors(episodes, batch, metrics)
    state.extra["minibatch"] = 0
    return episodes, batch, metrics


def improve(run: Run, rl: RL, state: RunState, batch: Batch) -> dict[str, float]:
    """All optimizer steps on one rollout: each episode exactly `epochs` times. Means over the steps are returned."""
    start = time.perf_counter()
    steps = rl.epochs * rl.minibatches
    total = rl.steps * steps
    while state.extra["minibatch"] < steps:
        done = state.extra["minibatch"]
        members = minibatch_members(run.recipe.seed, rl, batch, state.rollout, done)
        lr = learning_rate(rl.optim, state.rollout * steps + done, total)
        metrics = minibatch_step(run, rl, state, batch, members, lr) if members else {}
        if done == 0 and metrics.get("policy/ratio_gap", 0.0) > RATIO_ALARM:
            gap = metrics["policy/ratio_gap"]
            message = f"first minibatch: the ratio differs from 1 by {gap:.3f} on average"
            run.record("alarm", stage="rl", step=state.rollout, message=message)
        state.extra.setdefault("updates", []).append(metrics)
        state.extra["minibatch"] = done + 1
        state.step += 1
        run.progress("rl", state.rollout + 0.3 + 0.7 * (done + 1) / steps, rl.steps, "update")
    updates = [u for u in state.extra.pop("updates") if u]
    means = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
    means["policy/first_ratio_gap"] = updates[0]["policy/ratio_gap"]
    if all(u["optim/skipped"] for u in updates):
        raise RunError(
            f"every optimizer step of rollout {state.rollout + 1} had a loss or gradient that is not finite",
            "lower rl.optim.lr, and look at the rewards in episodes.jsonl",
        )
    return means | {"time/update_s": time.perf_counter() - start}


def minibatch_members(seed: int, rl: RL, batch: Batch, rollout: int, index: int) -> list[int]:
    """The episodes of one minibatch: epoch by epoch, a permutation cut into `minibatches` nearly equal parts.

    Samples of one prompt stay together where the prompts divide evenly, so that their prompt is computed once.
    """
    epoch, part = divmod(index, rl.minibatches)
    groups: dict[int, list[int]] = {}
    for e, episode in enumerate(batch.episodes):
        key = episode.group if rl.prompts % rl.minibatches == 0 else e
        groups.setdefault(key, []).append(e)
    units = list(groups.values())
    order = permutation(len(units), seed, "minibatch", rollout, epoch)
    low, high = len(units) * part // rl.minibatches, len(units) * (part + 1) // rl.minibatches
    return [e for u in order[low:high] for e in units[int(u)]]


def minibatch_step(
    run: Run, rl: RL, state: RunState, batch: Batch, members: Sequence[int], lr: float
) -> dict[str, float]:
    """One optimizer step; every term is a mean over the action tokens of the whole minibatch."""
    model = state.model
    assert isinstance(model, ActorCritic)
    policy_loss = ALGORITHMS[rl.algorithm].policy_loss
    tokens = len(batch.rows(members))

    def loss_of(part: list[int]) -> tuple[Tensor, Stats]:
        chosen = [members[i] for i in part]
        ragged, action_A = lay_out([batch.episodes[e] for e in chosen])
        rows = batch.rows(chosen)
        device = model.policy.device
        scores = model.evaluate(ragged.to(device), action_A, temperature=rl.temperature)
        old_logp_A, advantage_A = batch.old_logp_A[rows].to(device), batch.advantage_A[rows].to(device)
        policy_A, policy_stats = policy_loss(rl, scores.logp_A, old_logp_A, advantage_A)
        loss = reduce(policy_A, tokens)
        stats: dict[str, Tensor] = {"loss/policy": loss}
        if scores.value_A is not None:
            value_A, _ = value_loss(
                scores.value_A,
                batch.return_A[rows].to(device),
                old_value_A=batch.value_A[rows].to(device),
                clip=rl.value_clip,
            )
            stats["loss/value"] = reduce(value_A, tokens)
            loss = loss + rl.value_weight * stats["loss/value"]
        if rl.entropy_weight:
            loss = loss - rl.entropy_weight * reduce(scores.entropy_A, tokens)
        ratio_A = torch.exp(scores.logp_A.detach() - old_logp_A)
        stats["policy/ratio_gap"] = reduce((ratio_A - 1).abs(), tokens)
        stats |= {f"policy/{name}": reduce(value.float(), tokens) for name, value in short_names(policy_stats).items()}
        return loss, stats

    lengths = [len(batch.episodes[e].ids) for e in members]
    groups = [batch.episodes[e].group for e in members]
    return optimizer_step(
        model,
        state.optimizer,
        micro_batches(lengths, rl.optim.micro_tokens, groups),
        loss_of,
        lr=lr,
        clip_norm=rl.optim.clip_norm,
        should_stop=run.should_stop,
    )


def short_names(stats: Any) -> dict[str, Tensor]:
    """Per-token statistics under the names of their means: clipped_A -> clipped."""
    return {name.removesuffix("_A"): value for name, value in stats.items() if name != "ratio_A"}


def finish_rollout(
    run: Run,
    rl: RL,
    actors: Actors,
    state: RunState,
    controller: AdaptiveKL,
    episodes: Sequence[Episode],
    batch: Batch,
    metrics: dict[str, float],
) -> None:
    """Record a rollout that has been learned from, and let go of it."""
    for episode in episodes:
        run.episodes.write("episode", stage="rl", step=state.rollout, **episode.record())
    controller.update(metrics["kl/reference_per_completion"], len(batch.episodes))
    state.extra["kl"] = controller.state()
    state.pending = None
    state.extra.pop("pending", None)
    state.rollout += 1
    metrics["memory/peak_gb"] = peak_memory_gb()
    seconds = metrics["time/rollout_s"] + metrics["time/prepare_s"] + metrics["time/update_s"]
    metrics["time/step_s"] = seconds
    run.record("step", stage="rl", step=state.rollout, metrics=metrics)
    if (state.rollout - 1) % run.recipe.eval.samples_every == 0 or state.rollout == rl.steps:
        run.record("samples", stage="rl", step=state.rollout, samples=sample_records(batch, actors.tokenizer))


def sample_records(batch: Batch, tokenizer: Tokenizer, count: int = 4) -> list[dict[str, Any]]:
    """The best, the worst and two middle episodes of a rollout, with each token's advantage as its credit."""
    ranked = sorted(range(len(batch.episodes)), key=lambda e: batch.episodes[e].total or 0.0)
    last = len(ranked) - 1
    picks = sorted({round(i * last / (count - 1)) for i in range(count)}, reverse=True)
    records = []
    for e in (ranked[p] for p in picks):
        episode, rows = batch.episodes[e], batch.rows([e])
        kl = float((batch.old_logp_A[rows] - batch.ref_logp_A[rows]).sum())
        records.append(
            {
                "prompt": episode.prompt,
                "completion": episode.completion,
                "tokens": tokenizer.pieces([episode.ids[a] for a in episode.actions]),
                "credit": [round(float(x), 3) for x in batch.advantage_A[rows]],
                "rewards": {name: round(score, 3) for name, score in episode.rewards.items()},
                "finish": episode.finish,
                "kl": round(kl, 2),
            }
        )
    return records
