"""The table at the end of a run: held-out prompts, what each model and the baseline make of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from upslope.algo import token_logprobs
from upslope.checkpoint import atomic_write_text
from upslope.config import Recipe, source_name
from upslope.engine import Engine, Sampling
from upslope.errors import DataError
from upslope.evaluate import Estimate, Outcome, change_of, estimates, table_rows, without_score
from upslope.models.trunk import Trunk, tokens_seen
from upslope.observe.events import finite
from upslope.rewards.reference import COLUMN as REFERENCE
from upslope.rewards.reference import references
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.alarms import REWARD, judged_worse
from upslope.training.batches import micro_batches
from upslope.training.collect import generate
from upslope.training.episode import Episode, action_starts, lay_out
from upslope.training.heldout import TaskMetrics
from upslope.training.ranking import logits_of, of_choices, reciprocal_ranks
from upslope.training.run import Run
from upslope.training.scoring import Scorer

EVAL_STEP = 2**31 - 1  # a rollout number of its own: the evaluation's random numbers are no training rollout's


@dataclass(frozen=True)
class Trial:
    """What every contender is put to: prompts, how they are answered, by what the answers are scored.

    base: the original model, whose perplexity is told; own_distribution: whether sampling is that of rl, so that the
    mean log-ratio of two policies is a KL.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    rewards: Scorer
    judges: Scorer
    task: TaskMetrics
    base: Trunk
    tokenizer: Tokenizer
    own_distribution: bool = True

    def sampled(self, run: Run, engine: Engine, draw: int) -> list[Episode]:
        """A model's answers, by the set `draw` of random numbers."""
        keys = list(range(len(self.prompts)))
        step = EVAL_STEP - draw
        return generate(run, engine, self.tokenizer, self.prompts, keys, self.sampling, samples=1, step=step)

    def given(self, answers: Sequence[str]) -> list[Episode]:
        """A baseline's answers, as if a policy had written and ended them."""
        episodes = []
        for n, (prompt, text) in enumerate(zip(self.prompts, answers, strict=True)):
            ids = self._written(text)
            first = len(prompt.ids)
            places = list(range(first, first + len(ids)))
            episodes.append(Episode(prompt.text, text, [*prompt.ids, *ids], places, [0.0] * len(ids), "eos", 0, n, 0))
        return episodes

    def _written(self, text: str) -> list[int]:
        """What a policy would have chosen to write this text. Raises DataError where it is no label."""
        labels = self.tokenizer.labels
        if not labels:
            return [*self.tokenizer.encode(text, special=False), self.tokenizer.eos_id]
        if text not in labels:
            raise DataError(
                f"the baseline answers {text!r:.40}, which is no label",
                "set task.baseline = majority, and task.reference to the column of data.classes",
            )
        return [labels.index(text)]

    def outcome(self, episodes: Sequence[Episode], policy: Trunk | None, start: Trunk | None) -> Outcome:
        """All numbers of some answers; KL where `policy` wrote them, to `start`."""
        rows = [p.row for p in self.prompts]
        measured = self.task(episodes, rows)
        single = {name: values for name, values in measured.scores.items() if name not in measured.sets}
        scores = {f"task: {name}": values for name, values in single.items()}
        for kind, group in (("reward", self.rewards), ("judge", self.judges)):
            for source in group.sources:
                scores[f"{kind}: {source.name}"] = np.asarray(source(episodes, rows).score_B, dtype=np.float64)
        if self.tokenizer.separator is not None and REFERENCE in rows[0]:
            scores["task: mrr"] = self._ranks(episodes, policy)
        choices = bool(self.tokenizer.labels)
        kl_P = np.full(len(episodes), np.nan)
        if policy is not None and start is not None and self.own_distribution:
            own = completion_logprobs(policy, episodes, self.sampling.temperature)
            first = own if policy is start else completion_logprobs(start, episodes, self.sampling.temperature)
            kl_P = own - first
        return Outcome(
            completions=[e.completion for e in episodes],
            scores=scores,
            base_nll_P=np.full_like(kl_P, np.nan) if choices else -completion_logprobs(self.base, episodes, 1.0),
            tokens_P=np.array([len(e.actions) for e in episodes], dtype=np.float64),
            kl_P=kl_P,
            ended_P=np.array([e.terminal for e in episodes], dtype=np.float64),
            sets={f"task: {name}": statistic for name, statistic in measured.sets.items()},
            choices=choices,
        )

    def _ranks(self, episodes: Sequence[Episode], policy: Trunk | None) -> np.ndarray:
        """1 / rank of each right passage, by the policy's own order or, without one, what a choice alone comes to."""
        right_P = [int(references(p.row)[0]) for p in self.prompts]
        if policy is not None:
            return reciprocal_ranks(logits_of(policy, [p.ids for p in self.prompts], 4096), right_P)
        counts = [p.ids.count(self.tokenizer.separator or 0) - 1 for p in self.prompts]
        return of_choices([e.ids[-1] for e in episodes], right_P, counts)


@torch.no_grad()
def completion_logprobs(model: Trunk, episodes: Sequence[Episode], temperature: float) -> np.ndarray:
    """The log-probability of each episode's actions, summed, under a model, in nats; nan beyond its context, where the
    answer of a baseline may lie."""
    sums = np.full(len(episodes), np.nan)
    seen = [tokens_seen(model.needs_source, e.prompt_length, len(e.ids) - e.prompt_length) for e in episodes]
    fitting = [i for i, tokens in enumerate(seen) if tokens <= model.config.context]
    for places in micro_batches([len(episodes[i].ids) for i in fitting], 4096):
        part = [fitting[i] for i in places]
        members = [episodes[i] for i in part]
        batch, action_A = lay_out(members, model.needs_source)
        batch = batch.to(model.device)
        hidden_AD = model.hidden(batch)[batch.previous[action_A]]
        logp_A, _ = token_logprobs(hidden_AD, model.output_weight, batch.ids_N[action_A], temperature=temperature)
        starts = action_starts(members)
        totals = [float(logp_A[a:b].double().sum()) for a, b in pairwise(starts.tolist())]
        sums[part] = totals
    return sums


@dataclass(frozen=True)
class Comparison:
    """How the outcomes stand beside each other: their labels in order, and which two the change is between."""

    labels: Sequence[str]
    before: int = 0
    after: int = 1
    title: str = "Held-out prompts, before and after rl"
    note: str = ""


def record_comparison(
    run: Run,
    prompts: Sequence[Prompt],
    outcomes: Sequence[Outcome],
    shape: Comparison = Comparison(("before", "after")),
) -> dict[str, list[Estimate]]:
    """Write the table of some outcomes, and some prompts with two models' answers, into the run; and the alarm where
    the reward has risen at the cost of what it should be for."""
    found = estimates(outcomes, seed=run.recipe.seed, change=(shape.before, shape.after))
    note = f"{len(prompts)} held-out prompts, one completion each; value [95 % bootstrap interval over prompts]"
    note += without_score(outcomes)
    run.record(
        "table",
        stage="eval",
        title=shape.title,
        columns=["", *shape.labels, "change"],
        rows=table_rows(outcomes, found),
        note=note + (f"; {shape.note}" if shape.note else ""),
    )
    paid = [_paid(outcomes[number], run.recipe) for number in (shape.before, shape.after)]
    change = {name: row[-1] for name, row in found.items()} | {REWARD: change_of(*paid, seed=run.recipe.seed)}
    ways = {name: 1 for name in found if name.startswith("judge: ")} | run.recipe.better
    message = judged_worse(change, ways)
    if message:
        run.record("alarm", stage="eval", name=judged_worse.__name__, message=message)
    shown = [
        _shown(prompts[p], outcomes[shape.before], outcomes[shape.after], p)
        for p in range(min(run.recipe.eval.show, len(prompts)))
    ]
    run.record("prompts", stage="eval", samples=shown)
    return found


def _paid(outcome: Outcome, recipe: Recipe) -> np.ndarray:
    """The weighted sum of the rewards of each prompt; nan where one failed, or none is paid."""
    rewards = recipe.rl.rewards if recipe.rl else {}
    parts = [weight * outcome.scores[f"reward: {source_name(source)}"] for source, weight in rewards.items()]
    return np.sum(parts, axis=0) if parts else np.full(len(outcome.completions), np.nan)


def write_answers(run: Run, prompts: Sequence[Prompt], labels: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """eval/answers.jsonl: a line for each prompt, with each contender's completion and scores, null if failed.

    From it the closing table, and any other statistic over these prompts, can be made without a model.
    """
    lines = []
    for p, prompt in enumerate(prompts):
        answers = {
            label: {
                "completion": outcome.completions[p],
                "tokens": int(outcome.tokens_P[p]),
                "ended": bool(outcome.ended_P[p]),
                "scores": finite({n: round(float(v[p]), 6) for n, v in outcome.scores.items()}, "scores", []),
            }
            for label, outcome in zip(labels, outcomes, strict=True)
        }
        reference = {"reference": prompt.row[REFERENCE]} if REFERENCE in prompt.row else {}
        line = {"row": prompt.number, "prompt": prompt.text, **reference, "answers": answers}
        lines.append(json.dumps(line, ensure_ascii=False))
    atomic_write_text(run.stage_folder("eval") / "answers.jsonl", "\n".join(lines) + "\n")


def _shown(prompt: Prompt, before: Outcome, after: Outcome, p: int) -> dict[str, Any]:
    """One prompt with both answers and their scores, for people."""
    return {
        "prompt": prompt.text,
        "before": before.completions[p],
        "after": after.completions[p],
        "scores": {
            n: [round(float(before.scores[n][p]), 3), round(float(after.scores[n][p]), 3)] for n in before.scores
        },
    }
