"""The RL loop: generate, score, prepare, update; blind to the algorithm's name."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from upslope.algo import explained_variance
from upslope.algo.random import permutation
from upslope.config import RL
from upslope.engine import Engine
from upslope.errors import Interrupted
from upslope.models.heads import ActorCritic
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.alarms import count_skipped, watch
from upslope.training.best import Best
from upslope.training.collect import collect
from upslope.training.controllers import Controllers
from upslope.training.episode import Episode
from upslope.training.export import export_policy
from upslope.training.heldout import Watched, watch_task
from upslope.training.objective import Prices, critic_step, drift, minibatch_step
from upslope.training.pending import batch_from_tensors, batch_to_tensors
from upslope.training.rollout import Batch, Frozen, policy_metrics, prepare, reference_metrics, rollout_metrics
from upslope.training.run import Run, peak_memory
from upslope.training.scoring import LearnedSource, Scorer
from upslope.training.state import RunState, freeze_lowest
from upslope.training.trust_region import trust_region_update
from upslope.training.update import StopAsked, learning_rate, make_optimizer
from upslope.training.work import rollout_work


@dataclass
class Actors:
    """Who takes part: the trained policy with its critic, the frozen models, the engine, the rewards."""

    model: ActorCritic
    frozen: Frozen
    engine: Engine
    scorer: Scorer
    tokenizer: Tokenizer
    watched: Watched | None = None


def run_rl(run: Run, rl: RL, actors: Actors, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Climb the reward for rl.steps rollouts, write rl/model. Raises Interrupted after saving when asked to stop."""
    model = actors.model
    freeze_lowest(model.policy, rl.freeze_layers)
    trained = model if rl.update == "gradient" else model.critic_parameters()
    optimizer = make_optimizer(trained, rl.optim, model.critic_parameters(), rl.critic_lr)
    state = RunState("rl", model, optimizer, companion=actors.frozen.mask)
    controllers, best = Controllers(rl), Best(rl.best_by, rl.patience)
    if state.restore(run):
        controllers.restore(state.extra["controllers"])
    state.extra["controllers"] = controllers.state()
    try:
        while True:
            load = partial(load_engine, rl, actors, state.rollout)
            found = watch_task(run, actors.watched, state, rl.steps, load, actors.scorer)
            if found:
                best.saw(run, state, state.rollout, found)
            if best.over(run, state, state.rollout, rl.steps):
                break
            episodes, batch, metrics = next_rollout(run, rl, actors, prompts, state, controllers)
            metrics |= improve(run, rl, actors, state, controllers, batch)
            if actors.frozen.scored_once(rl):
                metrics |= policy_metrics(batch)
            finish_rollout(run, rl, actors, state, controllers, episodes, batch, metrics)
            state.save_if_due(run)
    except (StopAsked, Interrupted):
        state.interrupt(run)
    chosen = best.hand_on(run, state)
    export_policy(run, "rl", model, actors.tokenizer)
    return state.finish(run, chosen | peak_memory())


def next_rollout(
    run: Run, rl: RL, actors: Actors, prompts: Sequence[Prompt], state: RunState, controllers: Controllers
) -> tuple[list[Episode], Batch, dict[str, float]]:
    """The rollout to learn from: the half-used one of a resumed run, or a new one."""
    if state.pending is not None:
        return batch_from_tensors(state.pending, state.extra["pending"])
    number = state.rollout
    run.progress("rl", number, rl.steps, "generate")
    start = time.perf_counter()
    load_engine(rl, actors, number)
    episodes, used = collect(
        run, actors.engine, actors.tokenizer, prompts, actors.scorer, rl, rollout=number, used=controllers.used
    )
    collected = time.perf_counter()
    run.progress("rl", number + 0.2, rl.steps, "log-probabilities")
    learned = [e for e in episodes if e.total is not None and e.used]
    controllers.saw_scores([e.total for e in episodes if e.total is not None])
    controllers.used = used
    score_scale = controllers.score_scale(rl)
    if number == 0 and learned:
        scores = [e.total for e in learned if e.total is not None]
        actors.model.begin_values(sum(scores) / len(scores) / score_scale)
    batch, found = prepare(
        learned,
        actors.model,
        actors.frozen,
        rl,
        controllers.kl.coefficient,
        running=controllers.returns or 0.0,
        score_scale=score_scale,
        should_stop=run.should_stop,
    )
    controllers.saw_return(found.mean)
    metrics = found.metrics | rollout_metrics(episodes, batch, rl.samples)
    if not actors.frozen.scored_once(rl):
        metrics |= policy_metrics(batch)
    if actors.frozen.reference is not None:
        metrics |= reference_metrics(batch) | {"kl/coefficient": controllers.kl.coefficient}
    if rl.critic != "none" and batch.episodes:
        metrics["critic/explained_variance"] = explained_variance(batch.value_A, batch.return_A)
    metrics["time/rollout_s"] = collected - start
    metrics["time/prepare_s"] = time.perf_counter() - collected
    state.pending, state.extra["pending"] = batch_to_tensors(episodes, batch, metrics)
    state.extra |= {"minibatch": 0, "updates": [], "controllers": controllers.state()}
    return episodes, batch, metrics


def load_engine(rl: RL, actors: Actors, number: int) -> Engine:
    """Give the engine the policy's present weights, and the cut's copy those of every rl.mask_every-th rollout."""
    if actors.frozen.mask is not None and number % rl.mask_every == 0:
        actors.frozen.mask.load_state_dict(actors.model.policy.state_dict())
    actors.engine.load(actors.model.policy, version=number, mask=actors.frozen.mask)
    return actors.engine


def improve(
    run: Run, rl: RL, actors: Actors, state: RunState, controllers: Controllers, batch: Batch
) -> dict[str, float]:
    """All optimizer steps on one rollout: each episode exactly `epochs` times. Means over the steps are returned.

    Under a trust region the policy takes one step of its own first, and these steps are the critic's. A drift beyond
    trust.max_kl ends the rollout's use early.
    """
    start = time.perf_counter()
    passes = rl.epochs * rl.minibatches
    steps = passes + (rl.update == "trust_region")
    while state.extra["minibatch"] < steps and batch.episodes:
        done = state.extra["minibatch"]
        metrics = one_update(run, rl, actors, state, controllers, batch, done)
        count_skipped(run, state, metrics, batch.episodes)
        state.extra["updates"].append(metrics)
        state.step += 1
        drifted = rl.trust.max_kl is not None and metrics.get("policy/approx_kl", 0.0) > rl.trust.max_kl
        state.extra["minibatch"] = steps if drifted else done + 1
        run.progress("rl", state.rollout + 0.3 + 0.7 * (done + 1) / steps, rl.steps, "update")
    led_to = {}
    if rl.trust.target is not None and batch.episodes:
        led_to["policy/drift"] = drift(rl, actors.model, batch, actors.frozen, run.should_stop)
        led_to["trust/coefficient"] = controllers.trust.coefficient
    metrics = means_of_updates(state.extra.pop("updates")) | led_to
    return metrics | {"time/update_s": time.perf_counter() - start}


def one_update(
    run: Run, rl: RL, actors: Actors, state: RunState, controllers: Controllers, batch: Batch, done: int
) -> dict[str, float]:
    """The optimizer step (or the trust region's) that follows `done` others on this rollout."""
    total = rl.steps * rl.epochs * rl.minibatches
    if rl.update == "trust_region":
        if done == 0:
            return trust_region_update(rl, actors.model.policy, batch, run.should_stop)
        done -= 1
    members = minibatch_members(run.recipe.seed, rl, batch, state.rollout, done)
    if not members:
        return {}
    lr = learning_rate(rl.optim, state.rollout * rl.epochs * rl.minibatches + done, total)
    if rl.update == "trust_region":
        return critic_step(run, rl, state, batch, members, lr)
    prices = Prices(kl=controllers.kl.coefficient, trust=controllers.trust.coefficient)
    return minibatch_step(run, rl, state, batch, members, lr, actors.frozen, prices)


def means_of_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each statistic's mean over the updates that have it, the first ratio gap, and KL(old, policy) before the last."""
    updates = [u for u in updates if u]
    names = dict.fromkeys(name for u in updates for name in u)
    means = {}
    for name in names:
        found = [u[name] for u in updates if name in u]
        means[name] = sum(found) / len(found)
    means["optim/updates"] = float(len(updates))
    if updates and "policy/ratio_gap" in updates[0]:
        means["policy/first_ratio_gap"] = updates[0]["policy/ratio_gap"]
        means["policy/last_approx_kl"] = updates[-1]["policy/approx_kl"]
    return means


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


def finish_rollout(
    run: Run,
    rl: RL,
    actors: Actors,
    state: RunState,
    controllers: Controllers,
    episodes: Sequence[Episode],
    batch: Batch,
    metrics: dict[str, float],
) -> None:
    """Record a rollout that has been learned from, and let go of it."""
    for episode in episodes:
        run.episodes.write("episode", stage="rl", step=state.rollout, **episode.record())
    if math.isfinite(metrics.get("kl/reference_per_completion", math.nan)):
        controllers.kl.update(metrics["kl/reference_per_completion"], len(batch.episodes))
    if math.isfinite(metrics.get("policy/drift", math.nan)):
        controllers.trust.update(metrics["policy/drift"])
    state.extra["controllers"] = controllers.state()
    state.pending = None
    state.extra.pop("pending", None)
    state.rollout += 1
    metrics |= cost(rl, actors, episodes, batch, metrics["optim/updates"])
    metrics |= peak_memory()
    seconds = metrics["time/rollout_s"] + metrics["time/prepare_s"] + metrics["time/update_s"]
    metrics["time/step_s"] = seconds
    run.record("step", stage="rl", step=state.rollout, metrics=metrics)
    watch(run, rl, state, metrics)
    if batch.episodes and ((state.rollout - 1) % run.recipe.eval.samples_every == 0 or state.rollout == rl.steps):
        run.record("samples", stage="rl", step=state.rollout, samples=sample_records(batch, actors.tokenizer))


def cost(rl: RL, actors: Actors, episodes: Sequence[Episode], batch: Batch, updates: float) -> dict[str, float]:
    """Tokens and operations of a rollout and its updates; nothing for a trust region, which searches for its step."""
    if rl.update == "trust_region":
        return {}
    judges = [source.model.trunk for source in actors.scorer.sources if isinstance(source, LearnedSource)]
    scored = not actors.frozen.scored_once(rl)
    return rollout_work(
        actors.model,
        episodes,
        batch.episodes,
        passes=updates / rl.minibatches,
        scored=scored,
        reference=actors.frozen.reference,
        judges=judges,
    )


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
