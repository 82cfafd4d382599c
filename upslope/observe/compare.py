"""upslope compare: several runs in one table and one picture; compare.json, compare.md, compare.png, compare.svg.

comparison = compare([Path("runs/lambda")])          a sweep: one row a combination, over its seeds
comparison = compare([Path("runs/a"), Path("runs/b")])    one row a run
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from upslope.config import STAGES
from upslope.errors import RunError
from upslope.observe.picture import Figures, Line, draw
from upslope.observe.runs import (
    KINDS,
    Estimate,
    RunFacts,
    differing,
    estimate,
    find_runs,
    measures,
    objective,
    read_json,
    short_names,
)

SHOWN_SETTINGS = 6  # columns of what differs; the others stand in compare.json
TITLES = {
    "reward/mean": "training reward",
    "advantage/std": "advantage std",
    "advantage/bias": "λ-return bias",
    "advantage/rmse": "λ-return rmse",
    "kl/reference_per_completion": "KL per completion",
    "critic/explained_variance": "explained variance",
    "time/step_s": "s per rollout",
    "tokens/s": "tokens/s",
}
NOTE = (
    "reward and judge: completions of held-out prompts (the test side) after rl. training reward, KL per completion "
    "and explained variance: mean over the last quarter of the rollouts, on training prompts. advantage std (before "
    "normalisation), bias and root mean square error of the λ-return against the Monte-Carlo return: mean over all "
    "rollouts. s per rollout, and tokens sampled per second of it: median. -: not measured"
)


@dataclass(frozen=True)
class Row:
    """One line: a run, or the runs of one combination of a sweep. values: what was set, by dotted key."""

    label: str
    values: dict[str, Any]
    runs: list[RunFacts]
    estimates: dict[str, Estimate]
    state: str


@dataclass(frozen=True)
class Comparison:
    """What is compared. settings: the keys that differ; measured: the names of the numbers, in order."""

    rows: list[Row]
    settings: list[str]
    measured: list[str]
    notes: list[str]
    search: dict[str, Any] | None

    @property
    def grouped(self) -> bool:
        return any(row.runs[0].sweep for row in self.rows)


def compare(folders: Sequence[Path], out: Path | None = None) -> tuple[Comparison, Path]:
    """Compare runs and sweeps and write compare.json, .md, .png and .svg into a folder; returns both.

    out: the folder; without it the sweep's or run's own where there is one, else runs/compare. Raises RunError.
    """
    found = compare_runs(folders)
    out = out or (folders[0] if len(folders) == 1 else Path("runs") / "compare")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "compare.json", json.dumps(as_json(found), indent=1, ensure_ascii=False) + "\n")
        _write(out / "compare.md", as_markdown(found))
        draw(figures(found), out / "compare.png")
        draw(figures(found), out / "compare.svg")
    except OSError as error:
        raise RunError(f"cannot write in {out}: {error.strerror}", "choose another folder with -o") from None
    return found, out


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read and group runs: those of a sweep that differ in their seed alone are one row. Raises RunError."""
    runs: dict[Path, RunFacts] = {}
    for folder in folders:
        runs |= {run.folder.resolve(): run for run in find_runs(folder)}
    if not runs:
        raise RunError(f"{', '.join(map(str, folders))}: no run has begun", "start the sweep first")
    everything = list(runs.values())
    settings = differing([run.settings for run in everything])
    groups: dict[str, list[RunFacts]] = {}
    for run in everything:
        values = json.dumps([run.settings.get(key) for key in settings])
        groups.setdefault(values if run.sweep else str(run.folder), []).append(run)
    records = [read_json(f / "sweep.json") for f in folders if (f / "sweep.json").is_file()]
    search = next((r["search"] for r in records if r.get("search")), None)
    rows = [_row(group, settings, search) for group in groups.values()]
    labels = [row.label for row in rows]
    rows = [replace(r, label=str(r.runs[0].folder)) if labels.count(r.label) > 1 else r for r in rows]
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row.estimates)
    if any("rl" in run.settings["stages"].split("+") for run in everything):
        names |= dict.fromkeys(TITLES)  # what was not measured is a column of dashes, not a silence
    measured = sorted(names, key=_place)
    rows = _sorted(rows, settings, search)
    return Comparison(rows, settings, measured, _notes(rows, settings, records, search), search)


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything of a comparison: for each row its settings, its runs, and mean, interval, values of each measure."""
    rows = [
        {
            "label": row.label,
            "state": row.state,
            "settings": row.values,
            "runs": [
                {"folder": str(run.folder), "seed": run.settings.get("seed"), "state": run.state} for run in row.runs
            ],
            "measures": {
                name: {"mean": e.mean, "half_width_95": e.half, "runs": e.count, "values": list(e.values)}
                for name, e in row.estimates.items()
            },
        }
        for row in found.rows
    ]
    return {
        "settings": found.settings,
        "measures": found.measured,
        "rows": rows,
        "notes": found.notes,
        "search": found.search,
    }


def as_cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table for people: column titles, and the cells of each row."""
    shown = found.settings[:SHOWN_SETTINGS]
    short = _titles(found.settings)
    head = [] if found.grouped else ["run"]
    if found.grouped and not shown:
        head = ["runs of"]
    titles = [*head, *(short[key] for key in shown), "state", *(TITLES.get(name, name) for name in found.measured)]
    digits = {
        name: _digits([row.estimates[name] for row in found.rows if name in row.estimates]) for name in found.measured
    }
    cells = []
    for row in found.rows:
        settings = [_value(row.values[key]) if key in row.values else "-" for key in shown]
        numbers = [_number(row.estimates.get(name), digits[name]) for name in found.measured]
        cells.append([*([row.label] if head else []), *settings, row.state, *numbers])
    return titles, cells


def as_markdown(found: Comparison) -> str:
    titles, cells = as_cells(found)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(re.sub(r"([|\\])", r"\\\1", cell) for cell in row) + " |" for row in cells]
    return "\n".join([*lines, "", *(line for note in found.notes for line in (note, ""))])


def show(found: Comparison, console: Console | None = None) -> None:
    """Print the table; where it is wider than the terminal, in parts below each other that begin alike."""
    titles, cells = as_cells(found)
    console = console or Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    first = len(titles) - len(found.measured) - 1  # name and settings, which every part begins with; then the state
    stacked = [
        [title.replace(" ", "\n") for title in titles],
        *[[c.replace(" ±", "\n±") for c in row] for row in cells],
    ]
    widths = [max(cell_len(line) for row in stacked for line in row[n].split("\n")) + 3 for n in range(len(titles))]
    room = console.width if console.is_terminal else sum(widths) + 2
    parts: list[list[int]] = [[]]
    for n in range(first, len(titles)):
        if parts[-1] and sum(widths[:first]) + sum(widths[i] for i in parts[-1]) + widths[n] > room - 2:
            parts.append([])
        parts[-1].append(n)
    wide = Console(
        file=console.file, width=max(room, 20), no_color=console.no_color, force_terminal=console.is_terminal
    )
    for part in parts:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for n in (*range(first), *part):
            table.add_column(
                Text(stacked[0][n]), justify="right" if n > first else "left", no_wrap=True, vertical="top"
            )
        for row in stacked[1:]:
            table.add_row(*(Text(row[n]) for n in (*range(first), *part)))
        wide.print(table)
    for note in found.notes:
        console.print(Text(note, style="dim" if console.is_terminal else ""))


def figures(found: Comparison) -> Figures:
    """What the picture shows: every row as a line, and the measures that some row has."""
    short = _titles(found.settings)
    lines = []
    for row in found.rows:
        curves = [run.curves.get("rl", {}).get("reward/mean", []) for run in row.runs]
        held_out = [c for run in row.runs for s in run.curves.values() for n, c in s.items() if n == "valid/loss" and c]
        measured = {TITLES.get(n, n): (e.mean, e.half, e.values) for n, e in row.estimates.items()}
        values = {short[key]: row.values[key] for key in found.settings if key in row.values}
        lines.append(Line(row.label, values, [c for c in curves if c] or held_out, measured))
    rewards = any(run.curves.get("rl", {}).get("reward/mean") for row in found.rows for run in row.runs)
    return Figures(
        lines=lines,
        swept=[short[key] for key in found.settings] if found.grouped else [],
        measures=[TITLES.get(n, n) for n in found.measured if any(n in row.estimates for row in found.rows)],
        curve_title="training reward, mean of each rollout" if rewards else "held-out loss",
        step_title="rollout" if rewards else "optimizer step",
        searched=found.search is not None,
    )


def _titles(keys: Sequence[str]) -> dict[str, str]:
    """Short names; what several stages have, steps and rates, is rl's where no other stage is named."""
    others = {*STAGES} - {"rl"}
    return {key: key if key.partition(".")[0] in others else name for key, name in short_names(keys).items()}


def _row(runs: list[RunFacts], settings: Sequence[str], search: dict[str, Any] | None) -> Row:
    done = [run for run in runs if run.done]
    counted = done or runs  # half a run beside whole ones would pull their mean
    table = [_measures(run, search) for run in counted]
    names: dict[str, None] = {}
    for one in table:
        names |= dict.fromkeys(one)
    estimates = {name: estimate([one[name] for one in table if name in one]) for name in names}
    values = {key: runs[0].settings[key] for key in settings if key in runs[0].settings}
    label = ", ".join(f"{name}={_value(values[key])}" for key, name in _titles(settings).items() if key in values)
    if runs[0].sweep is None:
        return Row(runs[0].folder.resolve().name, values, runs, estimates, runs[0].failure or runs[0].state)
    failed = sum(run.failure is not None for run in runs)
    parts = [(len(done), "done"), (failed, "failed"), (len(runs) - len(done) - failed, "unfinished")]
    state = ", ".join(f"{count} {what}" for count, what in parts if count)
    return Row(label or str(runs[0].settings.get("name", "run")), values, runs, estimates, state)


def _measures(run: RunFacts, search: dict[str, Any] | None) -> dict[str, float]:
    metric = search["metric"] if search else "reward/mean"
    stage = search.get("stage") if search else None
    value = objective(run, metric, stage) if metric not in TITLES else None
    return ({f"objective: {metric}": value} if value is not None else {}) | measures(run)


def _sorted(rows: list[Row], settings: Sequence[str], search: dict[str, Any] | None) -> list[Row]:
    """A search with its best first; a sweep by what was set; runs as they were named."""
    if search:
        name = search["metric"] if search["metric"] in TITLES else f"objective: {search['metric']}"
        sign = -1 if search["direction"] == "maximize" else 1
        return sorted(rows, key=lambda row: sign * row.estimates[name].mean if name in row.estimates else math.inf)
    if all(row.runs[0].sweep for row in rows):

        def order(row: Row) -> list[tuple[int, float, str]]:
            found = [row.values.get(key) for key in settings]
            return [(0, v, "") if isinstance(v, int | float) else (1, 0.0, _value(v)) for v in found]

        return sorted(rows, key=order)
    return rows


def _notes(
    rows: Sequence[Row], settings: Sequence[str], records: Sequence[dict[str, Any]], search: dict[str, Any] | None
) -> list[str]:
    notes = []
    if any(len(row.runs) > 1 for row in rows):
        count = max(len(row.runs) for row in rows)
        notes.append(
            f"mean ± half the width of the 95 % Student-t interval over up to {count} seeds, finished runs alone where "
            "there are any; each seed draws its own split, order and completions"
        )
    if search:
        notes.append(f"search: {search['data']}; no trial was chosen by a held-out column")
    if any("rl" in run.settings["stages"].split("+") for row in rows for run in row.runs):
        notes.append(NOTE)
    if len(settings) > SHOWN_SETTINGS:
        notes.append(f"{len(settings) - SHOWN_SETTINGS} more keys differ: {', '.join(settings[SHOWN_SETTINGS:])}")
    for record in records:
        failed = {name: run["reason"] for name, run in record["runs"].items() if run["status"] == "failed"}
        notes += [f"failed: {name}: {reason}" for name, reason in failed.items()]
    return notes


def _place(name: str) -> tuple[int, int]:
    kinds = ("objective: ", *KINDS)
    kind = next((n for n, start in enumerate(kinds) if name.startswith(start)), len(kinds))
    return kind, list(TITLES).index(name) if name in TITLES else -1


def _digits(estimates: Sequence[Estimate]) -> int:
    """Decimals that show three digits of a column's largest value."""
    largest = max((abs(e.mean) for e in estimates), default=0.0)
    return min(max(2 - math.floor(math.log10(largest)), 0), 8) if largest > 0 and math.isfinite(largest) else 2


def _number(found: Estimate | None, digits: int) -> str:
    if found is None:
        return "-"
    half = f" ± {found.half:.{digits}f}" if found.half is not None else ""
    return f"{found.mean:.{digits}f}{half}"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
