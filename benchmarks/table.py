"""From results to ratios, and from ratios to a table in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.plan import ROWS, Figure, Row

MET, MISSED, NONE = "yes", "no", ""


@dataclass(frozen=True)
class Measured:
    """A row's median of all repeats, with the smallest and largest of its repeats, and both sides' medians."""

    row: Row
    value: float
    low: float
    high: float
    top: float
    bottom: float | None
    repeats: int
    commit: str
    made: str

    @property
    def met(self) -> str:
        if self.row.aim is None:
            return NONE
        return MET if reaches(self.value, self.row.aim, self.row.at_least) else MISSED


def reaches(value: float, aim: float, at_least: bool) -> bool:
    return value >= aim if at_least else value <= aim


def figures(result: dict[str, Any], figure: Figure) -> dict[int, float]:
    """A figure in each repeat in which it was measured."""
    found: dict[int, float] = {}
    for run in result["runs"]:
        if (run["by"], run["what"]) == (figure.by, figure.name):
            value = run[figure.field] if figure.field in ("value", "peak_gb") else run["details"].get(figure.field)
            if value is not None:
                found[run["repeat"]] = float(value)
    return found


def measure(result: dict[str, Any], row: Row) -> Measured | None:
    """A row as one result has it: the ratio of medians, and the extremes of each repeat's own ratio.

    None where a side was not measured: nothing is guessed.
    """
    tops = figures(result, row.top)
    bottoms = figures(result, row.bottom) if row.bottom is not None else dict.fromkeys(tops, 1.0)
    both = sorted(set(tops) & set(bottoms))
    if not both:
        return None
    ratios = [tops[i] / bottoms[i] for i in both]
    top, bottom = (statistics.median(side[i] for i in both) for side in (tops, bottoms))
    shown = None if row.bottom is None else bottom
    about = (len(both), result["commit"][:7], result["made"][:10])
    return Measured(row, top / bottom, min(ratios), max(ratios), top, shown, *about)


def newest(results: Sequence[dict[str, Any]]) -> list[Measured]:
    """Every row that is asked for on the device, as the newest of some results has it.

    All must be of one machine, device, dtype, model and size.
    """
    ordered = sorted(results, key=lambda result: result["made"])
    found = []
    for row in asked(results):
        candidates = [m for m in (measure(result, row) for result in ordered) if m is not None]
        if candidates:
            found.append(candidates[-1])
    return found


def asked(results: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows that are asked for on the device that some results are of."""
    return [row for row in ROWS if all(result["device"] in row.on for result in results)]


def missing(results: Sequence[dict[str, Any]], measured: Sequence[Measured]) -> list[str]:
    """Rows that are asked for on this device and have no figure, with the reason where a result knows one."""
    there = {m.row.title for m in measured}
    reasons = {key: why for result in results for key, why in result["not_measured"].items()}
    lines = []
    for row in asked(results):
        if row.title not in there:
            sides = [f"{f.by} {f.name}" for f in (row.top, row.bottom) if f is not None]
            why = "; ".join(f"{side}: {reasons[side]}" for side in sides if side in reasons)
            lines.append(f"{row.title} ({why or 'not run'})")
    return lines


def number(value: float) -> str:
    """Three digits, without a power of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def with_unit(value: float, unit: str) -> str:
    return f"{number(value)}x" if unit == "x" else f"{number(value)} {unit}"


def aim_text(row: Row) -> str:
    sign = ">=" if row.at_least else "<="
    parts = [f"{sign} {with_unit(row.aim, row.unit)}"] if row.aim is not None else []
    if row.further is not None:
        parts.append(f"further {with_unit(row.further, row.unit)}")
    return ", ".join(parts)


def markdown(measured: Sequence[Measured]) -> str:
    """The table: median, smallest and largest repeat, both sides, the aim and whether it is met."""
    lines = ["| what | median [min, max] | sides | aim | met | repeats | commit |", "|---|---|---|---|---|---|---|"]
    for m in measured:
        unit = m.row.unit
        spread = f"{with_unit(m.value, unit)} [{number(m.low)}, {number(m.high)}]"
        sides = "" if m.bottom is None else f"{number(m.top)} / {number(m.bottom)}"
        cells = [m.row.title, spread, sides, aim_text(m.row), m.met, str(m.repeats), m.commit]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(results: Sequence[dict[str, Any]]) -> str:
    """A heading, the table, and what stands behind it, for results of one machine, device, dtype, model and size."""
    last = max(results, key=lambda result: result["made"])
    measured = newest(results)
    where = last["machine"].get("gpu") or f"{last['machine']['processor']}, {last['machine']['cores']} cores"
    lines = [f"### {last['model']}, {last['dtype']}, {last['device']}: {where}", "", markdown(measured), ""]
    lines.append(
        f"Last measured {last['made'][:10]}, {last['threads']} threads, torch {last['versions'].get('torch')}."
    )
    if any(result["changed_files"] for result in results):
        lines.append("At least one of these was measured with uncommitted changes: see `changed_files` in the results.")
    absent = missing(results, measured)
    if absent:
        lines += ["", "Not measured: " + "; ".join(absent) + "."]
    return "\n".join(lines)
