"""The one loop that learns from pairs: the stages reward (Bradley-Terry) and preference (DPO and its kin).

    loss = sum over pairs of L / pairs  -  sft_weight * sum over chosen sides of log p / their tokens

with both denominators those of the whole optimizer batch. Which L, and of which model, is the learner's (pairs.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from upslope.algo import reduce
from upslope.errors import DataError
from upslope.evaluate import Estimate, interval
from upslope.models.trunk import Trunk, tokens_seen
from upslope.text.examples import Pair
from upslope.text.tokenizer import Tokenizer
from upslope.training.alarms import count_skipped
from upslope.training.batches import batch_indices, micro_batches
from upslope.training.best import Best, due
from upslope.training.pairs import Learner, PairBatch, PairConfig, learned_tokens, pair_tokens
from upslope.training.reference import batch_of, held_out_batch, remember
from upslope.training.run import Run, peak_memory
from upslope.training.state import RunState, freeze_lowest
from upslope.training.update import Stats, StopAsked, learning_rate, make_optimizer, optimizer_step, stop_if
from upslope.training.work import Meter, Tokens, work


def run_pairs(
    run: Run, cfg: PairConfig, learner: Learner, tokenizer: Tokenizer, train: Sequence[Pair], valid: Sequence[Pair]
) -> dict[str, float]:
    """Learn from pairs, report the accuracy on unseen ones before and after, write STAGE/model: the last model, or the
    best by cfg.best_by.

    Returns the closing metrics. Raises Interrupted after saving when a stop is asked for, DataError for a pair beyond
    the model's context.
    """
    stage = learner.stage
    held_out = valid[: cfg.eval_pairs]
    _check_context(chain(train, held_out), learner.trunk)
    freeze_lowest(learner.trunk, cfg.freeze_layers)
    state = RunState(stage, learner.model, make_optimizer(learner.model, cfg.optim))
    best = Best(cfg.best_by, cfg.patience)
    state.restore(run)
    try:
        remember(run, state, cfg, learner, train, held_out)
        unseen = held_out_batch(state, held_out)
        while True:
            if due(state, cfg.steps, cfg.eval_every):
                found = measure(run, cfg, learner, unseen)
                run.record("eval", stage=stage, step=state.step, metrics=found)
                state.extra |= {"measured": state.step, "after": found, "before": state.extra.get("before", found)}
                if state.step or stage != "reward":  # at its start a reward model scores every text alike
                    best.saw(run, state, state.step, found)
            if best.over(run, state, state.step, cfg.steps):
                break
            items = batch_indices(len(train), cfg.batch, state.step, run.recipe.seed, stage)
            metrics = pair_step(run, state, cfg, learner, train, items)
            count_skipped(run, state, metrics, [train[i] for i in items])
            state.step += 1
            run.record("step", stage=stage, step=state.step, metrics=metrics)
            run.progress(stage, state.step, cfg.steps, "update")
            state.save_if_due(run)
        chosen = best.hand_on(run, state)
        learner.calibrate(train[: cfg.eval_pairs], cfg.optim.micro_tokens, run.should_stop)
    except StopAsked:
        state.interrupt(run)
    metrics = state.extra["after"] | chosen
    record_accuracy(run, stage, state.extra["before"], metrics, len(held_out))
    learner.export(run, tokenizer)
    before = {f"{name}_before": value for name, value in state.extra["before"].items()}
    return state.finish(run, before | metrics | peak_memory())


def pair_step(
    run: Run, state: RunState, cfg: PairConfig, learner: Learner, train: Sequence[Pair], items: Sequence[int]
) -> dict[str, float]:
    """One optimizer step on some pairs of the training side."""
    batch = batch_of(state, cfg, learner, train, items, run.should_stop)
    learned = learned_tokens(batch.pairs)
    size, tokens = len(batch.pairs), int(learned[0].sum())

    def loss_of(part: list[int]) -> tuple[Tensor, Stats]:
        loss_B, stats, chosen_logp_B = learner.compare(batch.part(part))
        loss = reduce(loss_B, size)
        means = {f"{state.stage}/{SHORT[name]}": reduce(value, size) for name, value in stats.items()}
        if chosen_logp_B is not None:
            means[f"{state.stage}/chosen_nll"] = reduce(-chosen_logp_B, tokens)
            loss = loss + learner.sft_weight * means[f"{state.stage}/chosen_nll"]
        return loss, means

    metrics = optimizer_step(
        learner.model,
        state.optimizer,
        micro_batches([pair_tokens(p) for p in batch.pairs], cfg.optim.micro_tokens),
        loss_of,
        lr=learning_rate(cfg.optim, state.step, cfg.steps),
        clip_norm=cfg.optim.clip_norm,
        should_stop=run.should_stop,
    )
    prompt, predicted = sum(p.prompt_length for p in batch.pairs), sum(int(n.sum()) for n in learned)
    read = Tokens(prompt, sum(pair_tokens(p) for p in batch.pairs) - prompt, predicted)
    metrics |= work(read, Meter.of(learner.trunk, projects=state.stage != "reward").step(read))
    return metrics if batch.z0 is None else metrics | {f"{state.stage}/z0": float(batch.z0)}


SHORT = {
    "correct_B": "pair_accuracy",
    "margin_B": "margin",
    "chosen_reward_B": "chosen_reward",
    "rejected_reward_B": "rejected_reward",
}


@torch.no_grad()
def measure(run: Run, cfg: PairConfig, learner: Learner, unseen: PairBatch) -> dict[str, float]:
    """How often the better one of unseen pairs has the higher (implicit) reward, ties half, and by how much.

    Raises StopAsked.
    """
    margins = np.zeros(len(unseen.pairs))
    for part in micro_batches([pair_tokens(p) for p in unseen.pairs], cfg.optim.micro_tokens):
        stop_if(run.should_stop)
        _, stats, _ = learner.compare(unseen.part(part))
        margins[part] = stats["margin_B"].double().cpu().numpy()
    metrics: dict[str, float] = {}
    for name, values in (("pair_accuracy", 0.5 * (np.sign(margins) + 1.0)), ("margin", margins)):
        mean, low, high = interval(values, seed=run.recipe.seed)
        metrics |= {f"valid/{name}": mean, f"valid/{name}_low": low, f"valid/{name}_high": high}
    return metrics


def record_accuracy(run: Run, stage: str, before: dict[str, float], after: dict[str, float], pairs: int) -> None:
    """Write the table of the held-out accuracy and margin into the run."""

    def shown(metrics: dict[str, float], name: str, scale: float, digits: int) -> str:
        found = (scale * metrics[f"valid/{name}{end}"] for end in ("", "_low", "_high"))
        return Estimate(*found).text(digits)

    rows = [
        ["the better one ahead, %", *(shown(m, "pair_accuracy", 100, 1) for m in (before, after))],
        ["by, on average", *(shown(m, "margin", 1, 3) for m in (before, after))],
    ]
    reward = "rewards" if stage == "reward" else "implicit rewards"
    kind = "pairs of unseen groups" if run.recipe.data.group else "unseen pairs"
    note = f"{reward} of {pairs} {kind}; chance is 50 %; value [95 % bootstrap interval over pairs]"
    title = f"{stage}: held-out pairs"
    run.record("table", stage=stage, title=title, columns=["", "before", "after"], rows=rows, note=note)


def _check_context(pairs: Iterable[Pair], model: Trunk) -> None:
    context = model.config.context
    sides = ((p.prompt_length, len(side) - p.prompt_length) for p in pairs for side in (p.chosen, p.rejected))
    longest = max(tokens_seen(model.needs_source, *lengths) for lengths in sides)
    if longest > context:
        raise DataError(
            f"a side of a pair has {longest} tokens, the model's context is {context}", "lower data.max_tokens"
        )
