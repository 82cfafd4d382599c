"""Bradley-Terry on pairs: the stage reward.

    loss = - log sigmoid(score(chosen) - score(rejected)), averaged over the pairs of the optimizer batch

When it is fitted, its scores are shifted and scaled to mean 0 and standard deviation 1 over the training texts:
a constant of the model from then on, so that one KL coefficient means the same for any reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from upslope.algo import bradley_terry_loss
from upslope.config import RewardModel as RewardConfig
from upslope.evaluate import interval
from upslope.models.heads import RewardModel
from upslope.ragged import Ragged
from upslope.text.prepare import Pair
from upslope.text.tokenizer import Tokenizer
from upslope.training.batches import batch_indices, micro_batches
from upslope.training.export import export_reward_model
from upslope.training.run import Run, peak_memory_gb
from upslope.training.state import RunState, freeze_lowest
from upslope.training.update import Stats, StopAsked, learning_rate, make_optimizer, optimizer_step, stop_if


def run_reward(
    run: Run, cfg: RewardConfig, model: RewardModel, tokenizer: Tokenizer, train: list[Pair], valid: list[Pair]
) -> dict[str, float]:
    """Fit the reward model, report its accuracy on unseen pairs, write reward/model. Returns the closing metrics."""
    freeze_lowest(model.trunk, cfg.freeze_layers)
    state = RunState("reward", model, make_optimizer(model, cfg.optim))
    state.restore(run)
    try:
        for step in range(state.step, cfg.steps):
            batch = [train[i] for i in batch_indices(len(train), cfg.batch, step, run.recipe.seed, "reward")]
            metrics = reward_step(run, state, cfg, batch)
            state.step += 1
            run.record("step", stage="reward", step=state.step, metrics=metrics)
            run.progress("reward", state.step, cfg.steps, "update")
            state.save_if_due(run)
        held_out = valid[: cfg.eval_pairs]
        right_B = pair_accuracy(model, held_out, cfg.optim.micro_tokens, run.should_stop)
        seen = [ids for pair in train[: cfg.eval_pairs] for ids in (pair.chosen, pair.rejected)]
        score_B = score_texts(model, seen, cfg.optim.micro_tokens, run.should_stop)
    except StopAsked:
        state.interrupt(run)
    mean, low, high = interval(right_B, seed=run.recipe.seed)
    model.set_scale(mean=float(score_B.mean()), std=float(score_B.std()))
    metrics = {"valid/pair_accuracy": mean, "valid/pair_accuracy_low": low, "valid/pair_accuracy_high": high}
    run.record("eval", stage="reward", step=state.step, metrics=metrics)
    rows = [["the better one scores higher", f"{100 * mean:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"]]
    note = f"{len(held_out)} pairs of unseen groups; chance is 50 %"
    columns = ["", "share of pairs", "95 % interval"]
    run.record("table", stage="reward", title="reward model: held-out accuracy", columns=columns, rows=rows, note=note)
    export_reward_model(run, "reward", model, tokenizer)
    return state.finish(run, metrics | {"memory/peak_gb": peak_memory_gb()})


def reward_step(run: Run, state: RunState, cfg: RewardConfig, batch: Sequence[Pair]) -> dict[str, float]:
    """One optimizer step on a batch of pairs."""
    model = state.model
    assert isinstance(model, RewardModel)

    def loss_of(part: list[int]) -> tuple[Tensor, Stats]:
        pairs = [batch[i] for i in part]
        texts = Ragged.of([p.chosen for p in pairs] + [p.rejected for p in pairs]).to(model.trunk.device)
        chosen_B, rejected_B = model.score(texts).split(len(pairs))
        loss_B, _ = bradley_terry_loss(chosen_B, rejected_B)
        right = (chosen_B > rejected_B).sum() / len(batch)
        margin = (chosen_B - rejected_B).sum() / len(batch)
        return loss_B.sum() / len(batch), {"reward/pair_accuracy": right, "reward/margin": margin}

    return optimizer_step(
        model,
        state.optimizer,
        micro_batches([len(p.chosen) + len(p.rejected) for p in batch], cfg.optim.micro_tokens),
        loss_of,
        lr=learning_rate(cfg.optim, state.step, cfg.steps),
        clip_norm=cfg.optim.clip_norm,
        should_stop=run.should_stop,
    )


@torch.no_grad()
def score_texts(
    model: RewardModel, texts: Sequence[Sequence[int]], micro_tokens: int, should_stop: Callable[[], bool]
) -> np.ndarray:
    """The score of each token sequence, in the order given. Raises StopAsked."""
    scores = np.zeros(len(texts), dtype=np.float64)
    for part in micro_batches([len(t) for t in texts], 2 * micro_tokens):
        stop_if(should_stop)
        score_B = model.score(Ragged.of([texts[i] for i in part]).to(model.trunk.device))
        scores[part] = score_B.double().cpu().numpy()
    return scores


def pair_accuracy(
    model: RewardModel, pairs: Sequence[Pair], micro_tokens: int, should_stop: Callable[[], bool]
) -> np.ndarray:
    """1 where the chosen text scores higher, 0 where lower, 0.5 where equal; one value per pair."""
    texts = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = score_texts(model, texts, micro_tokens, should_stop)
    gap = scores[: len(pairs)] - scores[len(pairs) :]
    return 0.5 * (np.sign(gap) + 1.0)
