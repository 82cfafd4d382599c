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
from upslope.models.encoder import Encoder
from upslope.models.trunk import Trunk
from upslope.ragged import send
from upslope.text.examples import Example
from upslope.text.tokenizer import Tokenizer
from upslope.training.alarms import count_skipped
from upslope.training.batches import batch_indices, lay_out_texts, micro_batches
from upslope.training.export import export_policy
from upslope.training.masked import HELD_OUT, Masked, hide, masked_logprobs
from upslope.training.run import Run, peak_memory
from upslope.training.state import RunState, freeze_lowest
from upslope.training.update import Stats, StopAsked, learning_rate, make_optimizer, optimizer_step, stop_if


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
    """Fit the model, report the held-out loss before and after, write STAGE/model. Returns the closing metrics.

    at_end: measures more of the finished model, given the number of steps.
    Raises Interrupted after saving when a stop is asked for.
    """
    freeze_lowest(model, cfg.freeze_layers)
    state = RunState(stage, model, make_optimizer(model, cfg.optim))
    valid = valid[: cfg.eval_examples]
    masks = stage == "pretrain" and model.masks
    seed = run.recipe.seed
    if masks:
        assert isinstance(model, Encoder)
        model.read_masks()
        hiding = partial(hide, mask_id=tokenizer.inner.mask_token_id, tokens=model.config.tokens, seed=seed)
        valid = hiding(valid, step=HELD_OUT)
    try:
        if not state.restore(run) or "before" not in state.extra:
            state.extra["before"] = evaluate(run, stage, 0, model, valid, cfg.optim.micro_tokens)
        for step in range(state.step, cfg.steps):
            batch = [train[i] for i in batch_indices(len(train), cfg.batch, step, seed, stage)]
            batch = hiding(batch, step=step) if masks else batch
            metrics = supervised_step(run, state, cfg, batch)
            count_skipped(run, state, metrics, batch)
            state.step += 1
            run.record("step", stage=stage, step=state.step, metrics=metrics)
            run.progress(stage, state.step, cfg.steps, "update")
            state.save_if_due(run)
        after = evaluate(run, stage, state.step, model, valid, cfg.optim.micro_tokens)
        measured = at_end(state.step) if at_end else {}
    except StopAsked:
        state.interrupt(run)
    before = state.extra["before"]
    rows = [[name.removeprefix("valid/"), f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in after]
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
    return metrics | {"tokens/trained": float(trained)}


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
        metrics |= choices(model, examples, micro_tokens)
    run.record("eval", stage=stage, step=step, metrics=metrics)
    return metrics


@torch.no_grad()
def choices(model: Trunk, examples: Sequence[Example], micro_tokens: int) -> dict[str, float]:
    """Of a classifier's likeliest labels: the share that is right, and the mean over labels of F1.

    F1 = 2 TP / (2 TP + FP + FN); a label that neither stands in the examples nor is chosen has no part in the mean.
    """
    labels = len(model.labels)
    count = np.zeros((labels, labels))  # right label x chosen label
    for part in micro_batches([len(e.ids) for e in examples], 2 * micro_tokens):
        texts = [examples[i].ids for i in part]
        batch, place_N = lay_out_texts(texts, [len(ids) - 1 for ids in texts], model.needs_source)
        last = place_N[torch.tensor([len(ids) for ids in texts]).cumsum(0) - 1]
        hidden_BD = model.hidden(batch.to(model.device))[batch.previous[last].to(model.device)]
        chosen = (hidden_BD @ model.output_weight.to(hidden_BD.dtype).t()).argmax(1)
        np.add.at(count, (np.array([ids[-1] for ids in texts]), chosen.cpu().numpy()), 1)
    right, there, found = count.diagonal(), count.sum(1), count.sum(0)
    seen = there + found > 0
    f1 = 2 * right[seen] / (there + found)[seen]
    return {"valid/accuracy": float(right.sum() / count.sum()), "valid/macro_f1": float(f1.mean())}
