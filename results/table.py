"""From records to figures: means over seeds, with intervals over prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from results.plan import Arm, Group
from results.record import stands_for, total
from upslope.config.metrics import falls
from upslope.evaluate import Estimate
from upslope.observe.runs import KINDS

Z_975 = 1.959964
PRICES = ("KL to the start, nats", "distinct-2", "mean length, tokens")
Record = Mapping[str, Any]


def pooled(intervals: Sequence[Sequence[float]]) -> Estimate:
    """The mean over seeds of a value, with its interval over prompts and seeds.

        mean +- 1.96 sqrt((s^2 + w) / n)

    s^2 is the variance between the n seeds' values, w the mean of their variances over prompts, each a quarter of its
    bootstrap interval's width over 1.96, squared: what differs between seeds holds part of w already, so that the
    interval is rather too wide. One seed keeps its own interval.
    """
    values = [value for value, _, _ in intervals]
    if len(values) == 1:
        return Estimate(*intervals[0])
    within = fmean(((high - low) / (2 * Z_975)) ** 2 for _, low, high in intervals)
    half = Z_975 * math.sqrt((variance(values) + within) / len(values))
    return Estimate(fmean(values), fmean(values) - half, fmean(values) + half)


@dataclass(frozen=True)
class Outcome:
    """An arm of the plan as its records have it. after: of the last model of a run."""

    group: Group
    arm: Arm
    records: tuple[Record, ...]
    waiting: int  # runs of the plan without a record

    def figure(self, label: str, metric: str | None = None) -> Estimate | None:
        """A metric (the group's unless named) in a column of the closing tables: before, after, change and so on.

        None where a run does not have it.
        """
        rows = [record["table"].get(metric or self.group.metric, {}) for record in self.records]
        found = [row[label] for row in rows if label in row and all(_finite(v) for v in row[label])]
        return pooled(found) if found and len(found) == len(rows) else None

    @property
    def others(self) -> list[str]:
        """The other metrics that the page shows: the task's, rewards, judges, and what may be paid for a gain."""
        names = self.records[0]["table"]
        return [n for n in names if n != self.group.metric and (n.startswith(KINDS) or n in PRICES)]

    @property
    def last(self) -> str:
        """The column of the last model."""
        labels = self.records[0]["table"][self.group.metric]
        return "expert" if "expert" in labels else "after"

    @property
    def verdict(self) -> str:
        """Of the change: "better" or "worse" beyond its interval, or "even"."""
        change = self.figure("change")
        if change is None:
            return "even"
        rose, fell = change.low > 0, change.high < 0
        if falls(self.group.metric.removeprefix("task: ")):
            rose, fell = fell, rose
        return "better" if rose else "worse" if fell else "even"

    def mean(self, key: str, *, rl: bool | None = None) -> float:
        """A cost, mean over the seeds; of memory the highest."""
        costs = [total(record, key, rl=rl) for record in self.records]
        return max(costs) if key == "peak_gb" else fmean(costs)

    def measure(self, name: str) -> Estimate | None:
        """A measure of the training, mean over seeds; its interval is the range over them."""
        found = [record["measures"][name] for record in self.records if name in record["measures"]]
        return Estimate(fmean(found), min(found), max(found)) if found else None


def outcomes(groups: Sequence[Group], records: Mapping[str, Record]) -> list[Outcome]:
    """Every arm of the plan with the records that stand for its runs. Smoke runs measure nothing and count for none."""
    made = []
    for group in groups:
        for arm in group.arms:
            found = [records[job.name] for job in arm.jobs if stands_for(records.get(job.name), job)]
            full = tuple(record for record in found if record["size"] == "full")
            made.append(Outcome(group, arm, full, len(arm.jobs) - len(full)))
    return made


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
