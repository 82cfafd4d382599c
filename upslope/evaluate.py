"""Models on held-out prompts: metrics with 95 % bootstrap intervals, side by side.

Every interval is a percentile bootstrap over prompts; a change is a paired one, over the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from upslope.algo.random import stream
from upslope.rewards.corpus import Statistic, distinct_1, distinct_2

DRAWS = 1000
DISTINCT = ("distinct-1", "distinct-2", "distinct_1", "distinct_2")


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int, *, signed: bool = False) -> str:
        """value [low, high] with so many decimals, and one more where an end beside 0 would be shown as 0."""
        if np.isnan(self.value):
            return "-"
        digits += any(end != 0 and round(end, digits) == 0 for end in (self.low, self.high))
        value, low, high = (f"{x:{'+' if signed else ''}z.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Outcome:
    """What one model, or a baseline, makes of P prompts.

    scores: name -> one value a prompt; sets: name -> a statistic of a whole set; nll, tokens and KL (nan where there is
    none) of each completion; choices: whether these are choices, of which no fluency, diversity or length is told.
    """

    completions: list[str]
    scores: dict[str, np.ndarray]
    base_nll_P: np.ndarray
    tokens_P: np.ndarray
    kl_P: np.ndarray
    ended_P: np.ndarray
    sets: dict[str, Statistic] = field(default_factory=dict)
    choices: bool = False

    def statistics(self) -> dict[str, tuple[Statistic, int]]:
        """Name -> (statistic over drawn prompts, digits shown). A failed reward (nan) is left out of its mean."""
        table: dict[str, tuple[Statistic, int]] = {}
        for name, values in self.scores.items():
            table[name] = (lambda i, v=values: _mean(v[i]), _digits(name))  # type: ignore[misc]
        table |= {name: (statistic, _digits(name)) for name, statistic in self.sets.items()}
        table["KL to the start, nats"] = (lambda i: float(self.kl_P[i].mean()), 2)
        if self.choices:
            return table
        nll, tokens = self.base_nll_P, self.tokens_P
        table["perplexity, original model"] = (lambda i: float(np.exp(nll[i].sum() / tokens[i].sum())), 1)
        table |= {
            "distinct-1": (distinct_1(self.completions, ()), 2),
            "distinct-2": (distinct_2(self.completions, ()), 2),
        }
        table["mean length, tokens"] = (lambda i: float(self.tokens_P[i].mean()), 1)
        table["ended by itself"] = (lambda i: float(self.ended_P[i].mean()), 2)
        return table


def interval(values: np.ndarray, *, seed: int, draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean of the values with its 95 % percentile-bootstrap interval: (mean, low, high)."""
    drawn = stream(seed, "bootstrap").integers(0, len(values), size=(draws, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def change_of(before_P: np.ndarray, after_P: np.ndarray, *, seed: int) -> Estimate:
    """The change of a mean, over the prompts whose score failed (nan) in neither; nan where there is none."""
    change = after_P - before_P
    change = change[np.isfinite(change)]
    return Estimate(*interval(change, seed=seed)) if len(change) else Estimate(np.nan, np.nan, np.nan)


def resampled(statistic: Statistic, size: int, *, seed: int, draws: int = DRAWS) -> np.ndarray:
    """A statistic of a set of `size` prompts and, behind it, of each set that a bootstrap draws from these.

    The same seed draws the same sets: the difference of two such arrays is that of a change, paired over the prompts.
    """
    drawn = stream(seed, "bootstrap").integers(0, size, size=(draws, size))
    return np.array([statistic(i) for i in (np.arange(size), *drawn)])


def estimate(name: str, values: np.ndarray) -> Estimate:
    """A `resampled` statistic, or a change of it, with its 95 % interval.

    distinct-n falls as texts are added and repeated, so that its resampled values lie below the full one: its
    interval is moved to stand around the value of the whole set, and ends at 1.
    """
    value, samples = float(values[0]), values[1:]
    low, high = np.percentile(samples, [2.5, 97.5])
    if name.removeprefix("task: ") in DISTINCT:
        shift = value - samples.mean()
        low, high = low + shift, min(high + shift, 1.0)  # a share; that of a change, which is less, is left as it is
    return Estimate(value, float(low), float(high))


def estimates(
    outcomes: Sequence[Outcome], *, seed: int, draws: int = DRAWS, change: tuple[int, int] | None = None
) -> dict[str, list[Estimate]]:
    """Name -> an estimate for each outcome and, for two, a last one of the change, paired over the prompts.

    change: the two outcomes that it is between, the first subtracted from the second; where there are two, these.
    """
    size = len(outcomes[0].completions)
    tables = [outcome.statistics() for outcome in comparable(outcomes)]
    change = change or ((0, 1) if len(outcomes) == 2 else None)
    result: dict[str, list[Estimate]] = {}
    for name in tables[0]:
        found = [resampled(table[name][0], size, seed=seed, draws=draws) for table in tables]
        if change:
            found.append(found[change[1]] - found[change[0]])
        result[name] = [estimate(name, values) for values in found]
    return result


def table_rows(outcomes: Sequence[Outcome], found: dict[str, list[Estimate]]) -> list[list[str]]:
    """Rows for people: the name, then value [low, high] of each estimate."""
    digits = {name: shown for name, (_, shown) in outcomes[0].statistics().items()}
    return [
        [name, *(e.text(digits[name]) for e in row)]
        for name, row in found.items()
        if ":" in name or not all(np.isnan(e.value) for e in row)
    ]


def _digits(name: str) -> int:
    """Decimals shown: three of a task's metric, of 0 to 1 most of them."""
    return 3 if name.startswith("task: ") else 2


def comparable(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, a score left out (nan) in all of them where it failed in one.

    So each mean, and the change from one to the other, is over the same prompts.
    """
    failed = {name: _failed(outcomes, name) for name in outcomes[0].scores}
    return [replace(o, scores={n: np.where(failed[n], np.nan, v) for n, v in o.scores.items()}) for o in outcomes]


def without_score(outcomes: Sequence[Outcome]) -> str:
    """Of how many prompts a score failed, in one outcome or another, and is in no mean; empty where of none."""
    counts = {name: int(_failed(outcomes, name).sum()) for name in outcomes[0].scores}
    told = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    return f"; failed, and in no mean: {told}" if told else ""


def _failed(outcomes: Sequence[Outcome], name: str) -> np.ndarray:
    scores_OP = np.stack([outcome.scores[name] for outcome in outcomes])
    failed_P: np.ndarray = np.any(~np.isfinite(scores_OP), axis=0)
    return failed_P


def _mean(values: np.ndarray) -> float:
    """The mean of the scores that did not fail; nan where every one did."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
