"""What [task] measures on held-out prompts, apart from the reward, with 95 % bootstrap intervals.

During rl the same prompts are answered with the same random numbers every time, and the reward is measured on the same
completions, so that both lie side by side: where the reward has risen since the start while a metric of the task or a
part of the reward has become worse, both beyond chance, an alarm is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from upslope.config import source_name
from upslope.config.metrics import METRICS
from upslope.engine import Engine, Sampling
from upslope.errors import DataError
from upslope.evaluate import Estimate, change_of, estimate, resampled
from upslope.models.trunk import Trunk
from upslope.rewards.corpus import SETS, Statistic
from upslope.rewards.types import RewardOutput
from upslope.rewards.worker import load_function
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.alarms import REWARD, judged_worse
from upslope.training.collect import generate
from upslope.training.episode import Episode
from upslope.training.run import Run
from upslope.training.scoring import Scorer, Source
from upslope.training.state import RunState

# scores: of a row, each completion's; sets: of a row, what is `resampled`
Kept = dict[str, dict[str, list[float | None]]]
HELD_OUT_STEP = 2**29  # a rollout number of its own: these random numbers are no training rollout's


@contextmanager
def reading_rows(name: str) -> Iterator[None]:
    """What a named metric refuses are its rows: a ValueError "what: remedy" becomes a DataError."""
    try:
        yield
    except ValueError as error:
        what, _, remedy = str(error).partition(": ")
        raise DataError(f"metric {name}: {what}", remedy) from None


class MetricSource:
    """A trusted metric, computed in this process: upslope's own code over well-kept libraries, which always ends."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.function = load_function(source)

    def __call__(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> RewardOutput:
        with reading_rows(self.name):
            scores = self.function([e.prompt for e in episodes], [e.completion for e in episodes], list(rows))
        return RewardOutput(np.array(scores, dtype=np.float64), [None] * len(episodes))

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class Measured:
    """Of some completions: scores, one for each and metric that has such; sets, the metrics of the whole."""

    scores: dict[str, np.ndarray]
    sets: dict[str, Statistic]

    def statistics(self) -> dict[str, Statistic]:
        """Each metric as papers report it: of the whole set where it has such a form, else the mean."""
        means: dict[str, Statistic] = {name: _mean_of(values) for name, values in self.scores.items()}
        return means | self.sets


class TaskMetrics:
    """The metrics of [task], by name."""

    def __init__(self, names: Sequence[str], source_of: Callable[[str], Source]) -> None:
        self.names = [source_name(name) for name in names]
        single = [name for name in names if name not in METRICS or METRICS[name].source]
        self.sources = {source_name(name): source_of(name) for name in single}
        self.sets = {name: METRICS[name].set for name in names if name in METRICS and METRICS[name].set}

    def __call__(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> Measured:
        scores = {name: np.asarray(source(episodes, rows).score_B) for name, source in self.sources.items()}
        texts = [e.completion for e in episodes]
        with reading_rows(", ".join(self.sets)):
            return Measured(scores, {name: SETS[str(kind)](texts, rows) for name, kind in self.sets.items()})

    def close(self) -> None:
        for source in self.sources.values():
            source.close()


class Engines(Protocol):
    """What makes an engine for a model."""

    run: Run

    def engine(self, model: Trunk, version: int) -> Engine: ...


@dataclass
class Watched:
    """Held-out prompts and what is measured on them."""

    prompts: Sequence[Prompt]
    metrics: TaskMetrics
    sampling: Sampling
    tokenizer: Tokenizer

    def measure(
        self, run: Run, stage: str, step: int, engine: Engine, scorer: Scorer | None = None
    ) -> tuple[dict[str, float], Kept]:
        """Answer the prompts, record each metric and the reward with its interval. Raises StopAsked.

        Returns what was recorded, and by what a later measurement is compared.
        """
        keys = list(range(len(self.prompts)))
        rows = [p.row for p in self.prompts]
        episodes = generate(
            run, engine, self.tokenizer, self.prompts, keys, self.sampling, samples=1, step=HELD_OUT_STEP
        )
        measured = self.metrics(episodes, rows)
        statistics = {name: measured.statistics()[name] for name in self.metrics.names}
        single = {f"task: {name}": v for name, v in measured.scores.items() if name not in measured.sets}
        if scorer is not None:
            scorer.score(episodes, rows)
            single[REWARD] = np.array([math.nan if e.total is None else e.total for e in episodes])
            statistics[REWARD] = _mean_of(single[REWARD])
            for name in (source.name for source in scorer.sources):
                single[f"reward: {name}"] = np.array([e.rewards.get(name, math.nan) for e in episodes])
        found: dict[str, float] = {}
        kept: Kept = {"scores": {name: _numbers(values) for name, values in single.items()}, "sets": {}}
        for name, statistic in statistics.items():
            values = resampled(statistic, len(episodes), seed=run.recipe.seed)
            if name in measured.sets:
                kept["sets"][f"task: {name}"] = _numbers(values)
            e = estimate(name, values)
            found |= {f"task/{name}": e.value, f"task/{name}_low": e.low, f"task/{name}_high": e.high}
        run.record("eval", stage=stage, step=step, metrics=found)
        return found, kept

    def measure_model(self, engines: Engines, stage: str, model: Trunk, step: int) -> dict[str, float]:
        """What a stage's model comes to at its end."""
        return self.measure(engines.run, stage, step, engines.engine(model, step))[0]

    def close(self) -> None:
        self.metrics.close()


def watch_task(
    run: Run, watched: Watched | None, state: RunState, steps: int, load: Callable[[], Engine], scorer: Scorer
) -> dict[str, float]:
    """Measure the task where it is due after so many rollouts: at the start, every eval.every, at the end.

    Returns what was measured, nothing where it is not due. What was measured at the start is in the state, so that a
    resumed run agrees; nothing is measured twice.
    """
    every, at = run.recipe.eval.every, state.rollout
    seen = state.extra.get("held_out", {})
    if watched is None or not every or seen.get("at") == at or (at % every and at < steps):
        return {}
    metrics, now = watched.measure(run, state.stage, at, load(), scorer)
    start = seen.get("start", now)
    message = judged_worse(changes(start, now, run.recipe.seed), run.recipe.better)
    if message and not seen.get("alarm"):
        run.record("alarm", stage=state.stage, step=at, name="task_worse", message=message)
    state.extra["held_out"] = {"at": at, "start": start, "alarm": bool(message)}
    return metrics


def changes(start: Kept, now: Kept, seed: int) -> dict[str, Estimate]:
    """Of each row, the change since the start, paired over prompts."""

    def both(kind: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, values in now[kind].items():
            yield name, np.array(start[kind][name], dtype=np.float64), np.array(values, dtype=np.float64)

    found = {name: change_of(before_P, after_P, seed=seed) for name, before_P, after_P in both("scores")}
    return found | {name: estimate(name, after - before) for name, before, after in both("sets")}


def _numbers(values: np.ndarray) -> list[float | None]:
    """As JSON has them: None where one failed, which is nan again in an array."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _mean_of(values: np.ndarray) -> Statistic:
    """The mean of the scores that did not fail; nan where every one did."""

    def mean(i: np.ndarray) -> float:
        drawn = values[i]
        drawn = drawn[np.isfinite(drawn)]
        return float(drawn.mean()) if len(drawn) else math.nan

    return mean
