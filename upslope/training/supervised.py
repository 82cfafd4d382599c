"""Maximum likelihood on examples: the stages pretrain and sft.

loss = - sum over trained tokens of log p(token | before) / number of those tokens in the optimizer batch

The first token of an example is predicted by nothing: it is in neither the sum nor the number.
An encoder is pretrained on tokens that are masked: see masked.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from upslope.algo import token_logprobs
from upslope.config import Supervised
from upslope.errors import Interrupted
from upslope.models.encoder import Encoder
from upslope.models.trunk import Trunk
from upslope.ragged import send
from upslope.rewards.corpus import mean_f1
from upslope.text.examples import Example
from upslope.text.tokenizer import Tokenizer
from upslope.training.alarms import count_skipped
from upslope.training.batches import batch_indices, lay_out_texts, micro_batches
from upslope.training.best import Best, due
from upslope.training.export import export_policy
from upslope.training.masked import HELD_OUT, Masked, hide, masked_logprobs, masked_loss, next_metrics
from upslope.training.ranking import logits_of, reciprocal_ranks
from upslope.training.run import Run, peak_memory
from upslope.training.state import RunState, freeze_lowest
from upslope.training.update import Stats, StopAsked, learning_rate, make_optimizer, optimizer_step, stop_if
from upslope.training.work import Meter, text_tokens, work


def run_supervised(
    run: Run,
    stage: str,
    cfg: Supervised,
    model: Trunk,
    tokenizer: Tokenizer,
    train: Sequence[Example],
    valid: Sequence[Example],
    at_end: Callable[[int], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Fit the model, report the held-out loss before and after, write STAGE/model: the last model, or the best by
    cfg.best_by. Returns the closing metrics, which are of that model.

    at_end: measures more of the finished model, given the number of steps.
    Raises Interrupted after saving when a stop is asked for.
    """
    masks = stage == "pretrain" and model.masks
    seed, paired = run.recipe.seed, run.recipe.data.next
    valid = valid[: cfg.eval_examples]
    if masks:
        assert isinstance(model, Encoder)
        model.read_masks(paired)
        words, separator = model.config.tokens, tokenizer.end_id if paired else None
        hiding = partial(hide, mask_id=tokenizer.inner.mask_token_id, tokens=words, seed=seed, separator=separator)
        valid = hiding(valid, step=HELD_OUT)
    freeze_lowest(model, cfg.freeze_layers)
    state, best = RunState(stage, model, make_optimizer(model, cfg.optim)), Best(cfg.best_by, cfg.patience)
    try:
        state.restore(run)
        while True:
            if due(state, cfg.steps, cfg.eval_every):
                found = evaluate(run, stage, state.step, model, valid, cfg.optim.micro_tokens)
                state.extra |= {"measured": state.step, "after": found, "before": state.extra.get("before", found)}
                best.saw(run, state, state.step, found)
            if best.over(run, state, state.step, cfg.steps):
                break
            batch = [train[i] for i in batch_indices(len(train), cfg.batch, state.step, seed, stage)]
            batch = hiding(batch, step=state.step) if masks else batch
            metrics = supervised_step(run, state, cfg, batch)
            count_skipped(run, state, metrics, batch)
            state.step += 1
            run.record("step", stage=stage, step=state.step, metrics=metrics)
            run.progress(stage, state.step, cfg.steps, "update")
            state.save_if_due(run)
        chosen = best.hand_on(run, state)
        measured = at_end(int(chosen.get("best/step", state.step))) if at_end else {}
    except (StopAsked, Interrupted):
        state.interrupt(run)
    before, after = state.extra["before"], state.extra["after"] | chosen
    rows = [[name.removeprefix("valid/"), f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in before]
    note = f"{len(valid)} examples of unseen groups" if run.recipe.data.group else f"{len(valid)} unseen examples"
    run.record(
        "table", stage=stage, title=f"{stage}: held-out loss", columns=["", "before", "after"], rows=rows, note=note
    )
    export_policy(run, stage, model, tokenizer)
    closing = {f"{k}_before": v for k, v in before.items()} | after
    return state.finish(run, closing | measured | peak_memory())


def supervised_step(run: Run, state: RunState, cfg: Supervised, batch: Sequence[Example]) -> dict[str, float]:
    """One optimizer step on a batch of examples; its mean is over the trained tokens of the whole batch."""
    trained = sum(sum(example.trained[1:]) for example in batch)
    model = state.model
    assert isinstance(model, Trunk)

    def loss_of(part: list[int]) -> tuple[Tensor, Stats]:
        masked = [e for i in part if isinstance(e := batch[i], Masked)]
        if masked and isinstance(model, Encoder):
            return masked_loss(model, masked, trained, len(batch)), {}
        logp_A = example_logprobs(model, [batch[i] for i in part])
        return -logp_A.sum() / trained, {}

    metrics = optimizer_step(
        model,
        state.optimizer,
        micro_batches([len(e.ids) for e in batch], cfg.optim.micro_tokens),
        loss_of,
        lr=learning_rate(cfg.optim, state.step, cfg.steps),
        clip_norm=cfg.optim.clip_norm,
        should_stop=run.should_stop,
    )
    tokens = text_tokens(example.trained for example in batch)
    return metrics | {"tokens/trained": float(trained)} | work(tokens, Meter.of(model).step(tokens))


def example_logprobs(model: Trunk, examples: Sequence[Example]) -> Tensor:
    """logp_A of every trained token that has a token before it, over the examples in turn; or of what was masked."""
    masked = [e for e in examples if isinstance(e, Masked)]
    if masked and isinstance(model, Encoder):
        return masked_logprobs(model, masked)
    prompts = [e.trained.index(True) if any(e.trained) else len(e.ids) for e in examples]
    batch, place_N = lay_out_texts([e.ids for e in examples], prompts, model.needs_source)
    target_A = place_N[torch.tensor([t for e in examples for t in e.trained], dtype=torch.bool)]
    target_A = target_A[batch.previous[target_A] >= 0]
    batch = batch.to(model.device)
    state_A, target_A = send(batch.previous[target_A], model.device), send(target_A, model.device)
    hidden_ND = model.hidden(batch)
    logp_A, _ = token_logprobs(hidden_ND[state_A], model.output_weight, batch.ids_N[target_A])
    return logp_A


@torch.no_grad()
def evaluate(
    run: Run, stage: str, step: int, model: Trunk, examples: Sequence[Example], micro_tokens: int
) -> dict[str, float]:
    """Mean negative log-likelihood per trained token of held-out examples, and its exponential. Raises StopAsked."""
    total, count = 0.0, 0
    for part in micro_batches([len(e.ids) for e in examples], 2 * micro_tokens):
        stop_if(run.should_stop)
        logp_A = example_logprobs(model, [examples[i] for i in part])
        total -= float(logp_A.double().sum())
        count += logp_A.numel()
    loss = total / count
    metrics = {"valid/loss": loss, "valid/perplexity": math.exp(min(loss, 50.0))}
    if model.labels and not isinstance(examples[0], Masked):
        metrics |= choices(model, examples, micro_tokens, run.recipe.data.passages is not None)
    masked = [e for e in examples if isinstance(e, Masked)]
    if masked and masked[0].follows is not None and isinstance(model, Encoder):
        metrics |= next_metrics(model, masked, micro_batches([len(e.ids) for e in masked], 2 * micro_tokens))
    run.record("eval", stage=stage, step=step, metrics=metrics)
    return metrics


@torch.no_grad()
def choices(model: Trunk, examples: Sequence[Example], micro_tokens: int, passages: bool = False) -> dict[str, float]:
    """Of a classifier's likeliest labels: the share that is right, and the mean over labels of F1; of passages, whose
    numbers mean nothing, the mean reciprocal rank of the right one instead."""
    logits_BK = logits_of(model, [e.ids[:-1] for e in examples], 2 * micro_tokens)
    true_B, chosen_B = np.array([e.ids[-1] for e in examples]), logits_BK.argmax(1)
    accuracy = {"valid/accuracy": float((true_B == chosen_B).mean())}
    if passages:
        return accuracy | {"valid/mrr": float(reciprocal_ranks(logits_BK, true_B.tolist()).mean())}
    return accuracy | {"valid/macro_f1": mean_f1(true_B, chosen_B, len(model.labels))}
