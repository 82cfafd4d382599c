"""What the model that a preference stage starts from says of its pairs, worked out before the first step and kept.

The reference of DPO, IPO and KTO is the policy as it was. Before the first step the policy still is that model, in the
same dtype and by the same products, so no second one is ever loaded: its log-probabilities, two numbers a pair, are
computed step by step in the very micro-batches that the first pass over the data trains on (so the first gap is 0 to
the bit), and stand in every checkpoint (so a resumed run reads the same bits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from upslope.algo import kto_reference_point
from upslope.errors import DataError
from upslope.models.trunk import Trunk, tokens_seen
from upslope.text.examples import Pair
from upslope.training.batches import batch_indices, micro_batches
from upslope.training.pairs import Learner, PairBatch, PairConfig, Sides, pair_logprobs, pair_tokens
from upslope.training.run import Run
from upslope.training.state import RunState
from upslope.training.update import stop_if


def remember(
    run: Run, state: RunState, cfg: PairConfig, learner: Learner, train: Sequence[Pair], held_out: Sequence[Pair]
) -> None:
    """Fill state.pending with the reference's log-probabilities of all that the stage will read, if it reads any.

    Raises StopAsked; what is there already is kept. Raises DataError for kto's mismatched pairs
    that would not fit the context.
    """
    if not learner.reference:
        return
    model, budget = learner.trunk, cfg.optim.micro_tokens
    if learner.mismatched:
        _check_mismatched(train, model)
    if state.pending is None:
        unseen = _logprobs(model, held_out, budget, run.should_stop)
        state.pending = {"train": _nothing(len(train)), "held_out": unseen}
        if learner.mismatched:
            state.pending["mismatched"] = _nothing(cfg.steps * cfg.batch)
        state.extra["remembered"] = 0
    steps = cfg.steps if learner.mismatched else min(cfg.steps, -(-len(train) // cfg.batch))
    for step in range(state.extra["remembered"], steps):
        items = batch_indices(len(train), cfg.batch, step, run.recipe.seed, state.stage)
        known = state.pending["train"][0]
        new = [i for i in dict.fromkeys(items) if bool(known[i].isnan())]
        state.pending["train"][:, new] = _logprobs(model, [train[i] for i in new], budget, run.should_stop)
        if learner.mismatched:
            pairs = mismatched([train[i] for i in items])
            state.pending["mismatched"][:, _rows(cfg, step)] = _logprobs(model, pairs, budget, run.should_stop)
        state.extra["remembered"] = step + 1
        run.progress(state.stage, 0.0, cfg.steps, f"reference, {step + 1} of {steps}")
        state.save_if_due(run)


def batch_of(
    state: RunState,
    cfg: PairConfig,
    learner: Learner,
    train: Sequence[Pair],
    items: Sequence[int],
    should_stop: Callable[[], bool],
) -> PairBatch:
    """The pairs of one optimizer step with what is remembered of them; for kto also z0, of the policy as it is now."""
    pairs = [train[i] for i in items]
    if state.pending is None:
        return PairBatch(pairs)
    z0 = None
    if learner.mismatched:
        others = mismatched(pairs)
        now = _logprobs(learner.trunk, others, cfg.optim.micro_tokens, should_stop)
        then = state.pending["mismatched"][:, _rows(cfg, state.step)]
        z0 = kto_reference_point(now.flatten(), then.flatten())
    chosen_B, rejected_B = state.pending["train"][:, list(items)]
    return PairBatch(pairs, (chosen_B, rejected_B), z0)


def held_out_batch(state: RunState, held_out: Sequence[Pair]) -> PairBatch:
    """The held-out pairs with what is remembered of them."""
    if state.pending is None:
        return PairBatch(held_out)
    chosen_B, rejected_B = state.pending["held_out"]
    return PairBatch(held_out, (chosen_B, rejected_B))


def mismatched(pairs: Sequence[Pair]) -> list[Pair]:
    """Each pair's prompt with both sides of the next pair that has another prompt.

    Pairs of whole texts have none to exchange: there z0 is read from the texts themselves.
    """
    made = []
    for i, pair in enumerate(pairs):
        prompt = pair.chosen[: pair.prompt_length]
        following = [pairs[(i + k) % len(pairs)] for k in range(1, len(pairs))]
        others = (p for p in following if p.chosen[: p.prompt_length] != prompt)
        other = next(others, following[0])
        chosen, rejected = (prompt + side[other.prompt_length :] for side in (other.chosen, other.rejected))
        made.append(Pair(chosen, rejected, len(prompt)))
    return made


@torch.no_grad()
def _logprobs(model: Trunk, pairs: Sequence[Pair], budget: int, should_stop: Callable[[], bool]) -> Tensor:
    """(2, pairs): of the chosen and of the rejected sides, in the micro-batches of training."""
    found = _nothing(len(pairs))
    for part in micro_batches([pair_tokens(p) for p in pairs], budget):
        stop_if(should_stop)
        sides: Sides = pair_logprobs(model, [pairs[i] for i in part])
        found[:, part] = torch.stack(sides).to("cpu", found.dtype)
    return found


def _nothing(pairs: int) -> Tensor:
    return torch.full((2, pairs), float("nan"))


def _rows(cfg: PairConfig, step: int) -> slice:
    return slice(step * cfg.batch, (step + 1) * cfg.batch)


def _check_mismatched(pairs: Sequence[Pair], model: Trunk) -> None:
    context = model.config.context
    prompt = max(p.prompt_length for p in pairs)
    completion = max(len(side) - p.prompt_length for p in pairs for side in (p.chosen, p.rejected))
    if tokens_seen(model.needs_source, prompt, completion) > context:
        raise DataError(
            f"kto joins prompts of up to {prompt} tokens with completions of up to {completion} of other pairs, beyond "
            f"the model's context of {context}",
            "lower data.max_tokens",
        )
