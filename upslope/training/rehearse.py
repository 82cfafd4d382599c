"""What would fail late is tried before the first stage trains: data, models, scores and the table at the end, on a few
rows. Everything made here is thrown away; nothing is recorded, and the test side is read for its prompts' lengths only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset

from upslope.config import Recipe
from upslope.errors import DataError, Interrupted, RewardError
from upslope.evaluate import estimates, table_rows
from upslope.models.trunk import Trunk
from upslope.rewards.reference import COLUMN, references
from upslope.text.prepare import Prompt
from upslope.training.closing import baseline_answers
from upslope.training.data import make_prompts, preference_pairs, require_room, supervised_examples
from upslope.training.episode import Episode
from upslope.training.final import Trial
from upslope.training.parts import Pipeline, check_teacher
from upslope.training.scoring import FunctionSource, Scorer, Source
from upslope.training.state import freeze_lowest
from upslope.training.update import StopAsked

LOOKED_AT = 2000  # rows of a side; only where none of these is any use are all of them looked at
TRIED = 4  # prompts that are answered and scored
TOKENS = 8  # of an answer
Made = TypeVar("Made")


@dataclass
class Unrecorded:
    """Takes the accounts of rows that are looked at and put away."""

    recipe: Recipe

    def account(self, text: str, stage: str | None = None, examples: Sequence[str] = ()) -> None:
        """Nothing: the stage itself tells what became of its rows."""


def rehearse(p: Pipeline) -> None:
    """Try what the steps still to come need, as far as a few rows show it.

    Raises UpslopeError as the step itself would have done, Interrupted when a stop is asked for.
    """
    waiting = [step for step in p.recipe.steps if not p.run.done(step)]
    if len(waiting) < 2:
        return  # it is about to begin, and tells by itself
    model = p.trunk(p.start, trained=False)
    for stage in waiting[1:]:
        _try_data(p, stage, model)
        if stage != "eval":
            _try_models(p, stage, model)
    if p.recipe.evaluated or p.recipe.expert:
        try:
            _try_scores(p, model)
        except StopAsked:
            raise Interrupted("stopped before anything was trained", "the same command carries on") from None


def _try_data(p: Pipeline, stage: str, model: Trunk) -> None:
    """Whether a stage finds rows to learn from, to be watched by and to be measured on, and room for them."""
    book, train, valid = Unrecorded(p.recipe), p.splits["train"], p.held_out
    cfg = getattr(p.recipe, stage)

    def prompts(rows: Dataset, side: str, of: str, limit: int) -> None:
        made = _first(rows, lambda few: make_prompts(book, few, p.tokenizer, side, of))
        require_room(model, side, ((prompt.number, len(prompt.ids), limit) for prompt in made))

    def examples(rows: Dataset, side: str) -> None:
        made = _first(rows, lambda few: supervised_examples(book, stage, few, p.tokenizer, side))
        require_room(model, side, ((e.row, (n := e.trained.index(True)), len(e.ids) - n) for e in made))

    def pairs(rows: Dataset, side: str) -> None:
        _first(rows, lambda few: preference_pairs(book, stage, few, p.tokenizer, side, cfg.pairs_per_group))

    if stage in ("sft", "reward", "preference"):
        find = examples if stage == "sft" else pairs
        find(train, "train")
        find(valid, "held-out")
    elif stage == "eval":
        prompts(p.splits["test"], "test", "rl" if p.recipe.rl else "eval", p.recipe.max_completion)
    else:
        prompts(train, "train", stage, cfg.max_tokens)
    if stage == "expert":
        prompts(valid, "held-out", stage, cfg.max_tokens)
    if p.recipe.task.metrics and stage in ("sft", "rl", "expert"):
        prompts(valid, "held-out", stage, p.recipe.max_completion)


def _first(rows: Dataset, make: Callable[[Dataset], Made]) -> Made:
    """What is made of the first rows of a side, or of all where nothing is made of these. Raises DataError."""
    few = rows.select(range(min(len(rows), LOOKED_AT)))
    try:
        return make(few)
    except DataError:
        if len(few) == len(rows):
            raise
        return make(rows)


def _try_models(p: Pipeline, stage: str, model: Trunk) -> None:
    """Whether the models that a stage names can be read and fit the run; those that the run itself makes come later."""
    cfg = getattr(p.recipe, stage)

    def read(source: str | None) -> Trunk:
        own = source is None or Path(source).resolve().is_relative_to(p.models.resolve())
        return model if own else p.trunk(str(source), trained=False)

    freeze_lowest(read(cfg.init), cfg.freeze_layers)
    teacher = getattr(cfg, "teacher", None)
    check_teacher(teacher, read(teacher), model)


def _try_scores(p: Pipeline, model: Trunk) -> None:
    """Answer a few prompts and make the table of it: every reward, judge, metric and baseline but a model's to come."""
    prompts = _prompts(p)
    rows = [prompt.row for prompt in prompts]
    sampling = replace(p.sampling(), max_tokens=min(TOKENS, p.recipe.max_completion))
    nothing, metrics = Scorer([], [], 1.0), p.task_metrics(without=_to_come(p))
    try:
        is_kl = sampling.temperature == p.limit("temperature")
        trial = Trial(prompts, sampling, nothing, nothing, metrics, model, p.tokenizer, own_distribution=is_kl)
        answers = trial.sampled(p.run, p.engine(model, 0), 0)
        outcomes = [trial.outcome(answers, model, model)]
        likely = [*answers, *([] if p.tokenizer.labels else trial.given(_good_answers(p, prompts)))]
        for where, source in [("task.metrics", s) for s in metrics.sources.values()]:
            _try_source(where, source, likely, rows)
        if p.recipe.task.baseline and p.recipe.evaluated:
            outcomes += [trial.outcome(trial.given(baseline_answers(p, prompts)), None, None)]
        table_rows(outcomes, estimates(outcomes, seed=p.recipe.seed))
    finally:
        metrics.close()
    for where, name, stage in _named(p):
        source = p.near_source(name, stage)
        try:
            _try_source(where, source, likely, rows)
        finally:
            source.close()


def _prompts(p: Pipeline) -> list[Prompt]:
    """A few prompts of the validation side, or of the training side where there are none."""
    stage = "rl" if p.recipe.rl else "expert" if p.recipe.expert else "eval"
    book, rows = Unrecorded(p.recipe), p.held_out if len(p.held_out) else p.splits["train"]
    return _first(rows, lambda few: make_prompts(book, few, p.tokenizer, "rehearsed", stage))[:TRIED]


def _good_answers(p: Pipeline, prompts: Sequence[Prompt]) -> list[str]:
    """What a function may be expected to score: the reference of each row, or the prompt's own text."""
    return [references(prompt.row)[0] if COLUMN in prompt.row else prompt.text for prompt in prompts]


def _to_come(p: Pipeline) -> tuple[str, ...]:
    """Scores by models that the run has yet to train."""
    return () if p.run.done("reward") else ("stage:reward",)


def _named(p: Pipeline) -> Iterator[tuple[str, str, str]]:
    """(key, name, stage) of the rewards and judges, each once, but for those of the stage that is about to begin."""
    recipe, seen = p.recipe, set()
    first = next(step for step in recipe.steps if not p.run.done(step))
    rewards = recipe.rl.rewards if recipe.rl else {}
    asked = [("rl.reward", name, "rl") for name in rewards]
    asked += [("expert.reward", name, "expert") for name in recipe.expert_rewards]
    asked += [("eval.judges", name, "eval") for name in (recipe.eval.judges if recipe.evaluated else ())]
    seen |= {name for where, name, stage in asked if stage == first}
    for where, name, stage in asked:
        if name not in seen and name not in _to_come(p):
            seen.add(name)
            yield where, name, stage


def _try_source(where: str, source: Source, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> None:
    """Score the episodes, one of each row and then another of each. Raises RewardError where a function scores none."""
    output = source(episodes, [rows[n % len(rows)] for n in range(len(episodes))])
    failed = ~np.isfinite(output.score_B)
    if isinstance(source, FunctionSource) and failed.all():
        reason = next((f for f in output.failure_B if f), "a score that is no number")
        raise RewardError(
            f"{where}: {source.name} failed on each of the {len(episodes)} completions that it was tried on, the first "
            f"with {reason}",
            "mend it: nothing has been trained yet",
        )
