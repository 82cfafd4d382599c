"""The table at the end of a run: held-out prompts before and after rl, and what both write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from upslope.algo import token_logprobs
from upslope.engine import Engine
from upslope.evaluate import Estimate, Outcome, estimates, table_rows
from upslope.models.open import make_runner
from upslope.models.trunk import Trunk
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.alarms import judged_worse
from upslope.training.batches import micro_batches
from upslope.training.collect import generate, sampling_of
from upslope.training.episode import Episode, action_starts, lay_out
from upslope.training.run import Run
from upslope.training.scoring import Scorer

EVAL_STEP = 2**31 - 1  # a rollout number of its own: the evaluation's random numbers are no training rollout's


def evaluate_policies(
    run: Run,
    policies: Sequence[Trunk],
    base: Trunk,
    tokenizer: Tokenizer,
    scorer: Scorer,
    judges: Scorer,
    prompts: Sequence[Prompt],
    draw: int = 0,
) -> list[Outcome]:
    """Each policy on the same prompts with the same random numbers, the set `draw`. KL is to the first policy."""
    outcomes = []
    for number, policy in enumerate(policies):
        run.progress("eval", 0.1 + number, len(policies) + 0.5, "generate")
        rl = run.recipe.rl
        assert rl is not None
        runner = make_runner(policy, dtype=run.dtype)
        engine = Engine(
            runner,
            eos_id=tokenizer.eos_id,
            slots=rl.slots,
            seed=run.recipe.seed,
            text_of=tokenizer.decode,
            valid_vocab=tokenizer.vocab_size,
        )
        engine.load(policy, version=number)
        keys = list(range(len(prompts)))
        episodes = generate(run, engine, tokenizer, prompts, keys, sampling_of(rl), samples=1, step=EVAL_STEP - draw)
        del engine, runner
        run.progress("eval", 0.7 + number, len(policies) + 0.5, "judges")
        rows = [p.row for p in prompts]
        scores: dict[str, np.ndarray] = {}
        for kind, group in (("reward", scorer), ("judge", judges)):
            for source in group.sources:
                scores[f"{kind}: {source.name}"] = np.asarray(source(episodes, rows).score_B, dtype=np.float64)
        own = completion_logprobs(policy, episodes, rl.temperature)
        first = completion_logprobs(policies[0], episodes, rl.temperature) if number else own
        outcomes.append(
            Outcome(
                completions=[e.completion for e in episodes],
                scores=scores,
                base_nll_P=-completion_logprobs(base, episodes, 1.0),
                tokens_P=np.array([len(e.actions) for e in episodes], dtype=np.float64),
                kl_P=own - first,
                ended_P=np.array([e.terminal for e in episodes], dtype=np.float64),
            )
        )
    return outcomes


@torch.no_grad()
def completion_logprobs(model: Trunk, episodes: Sequence[Episode], temperature: float) -> np.ndarray:
    """The log-probability of each episode's actions, summed, under a model; nats."""
    sums = np.zeros(len(episodes))
    for part in micro_batches([len(e.ids) for e in episodes], 4096):
        members = [episodes[i] for i in part]
        batch, action_A = lay_out(members, model.needs_source)
        batch = batch.to(model.device)
        hidden_AD = model.hidden(batch)[batch.previous[action_A]]
        logp_A, _ = token_logprobs(hidden_AD, model.output_weight, batch.ids_N[action_A], temperature=temperature)
        starts = action_starts(members)
        totals = [float(logp_A[a:b].double().sum()) for a, b in pairwise(starts.tolist())]
        sums[part] = totals
    return sums


def record_comparison(
    run: Run, prompts: Sequence[Prompt], outcomes: Sequence[Outcome], weights: Mapping[str, float]
) -> dict[str, list[Estimate]]:
    """Write the table of two outcomes, and some prompts with both continuations, into the run.

    weights: of the table's rewards and judges; where what is paid for rose and what is not fell, an alarm is recorded.
    """
    found = estimates(outcomes, seed=run.recipe.seed)
    note = f"{len(prompts)} held-out prompts, one completion each; value [95 % bootstrap interval over prompts]"
    run.record(
        "table",
        stage="eval",
        title="Held-out prompts, before and after rl",
        columns=["", "before", "after", "change"],
        rows=table_rows(outcomes, found),
        note=note,
    )
    message = judged_worse(found, weights)
    if message:
        run.record("alarm", stage="eval", name=judged_worse.__name__, message=message)
    before, after = outcomes
    shown = [
        {
            "prompt": prompts[p].text,
            "before": before.completions[p],
            "after": after.completions[p],
            "scores": {
                n: [round(float(before.scores[n][p]), 3), round(float(after.scores[n][p]), 3)] for n in before.scores
            },
        }
        for p in range(min(run.recipe.eval.show, len(prompts)))
    ]
    run.record("prompts", stage="eval", samples=shown)
    return found
