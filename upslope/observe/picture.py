"""The picture of a comparison: learning curves, and each measure against what was set, drawn by matplotlib.

A sweep's picture has the values of one key along x (the key with most values), a colour for each, and a line style for
each combination of the other keys. Other runs get a colour and a bar each. Nothing here keeps state between calls.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from upslope.observe.runs import KINDS

COLUMNS = 3
CELL = (4.4, 3.3)  # inches
PANELS = (
    *("objective: ", *KINDS, "advantage std", "λ-return bias", "λ-return rmse"),
    *("KL per completion", "s per rollout"),
)
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKS = ("o", "s", "^", "D", "v")
FEW = ("#3b6fb6", "#d1603d", "#3f9b6c", "#8a5fb0", "#c2a02d", "#4fa7b8", "#b8548c", "#6b6b6b")
LEGEND = 10  # entries; a colour bar says more than a longer legend
LOOK: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "upslope",  # the same picture is the same file
}


@dataclass(frozen=True)
class Line:
    """A row of the table: values of the swept keys, a learning curve a seed, and of each measure the mean, half
    its interval, and the value of each seed."""

    label: str
    values: dict[str, Any]
    curves: list[list[tuple[int, float]]]
    measures: dict[str, tuple[float, float | None, tuple[float, ...]]]


@dataclass(frozen=True)
class Figures:
    """What is drawn. swept: keys of a sweep, none for other runs; measures: those that some line has."""

    lines: list[Line]
    swept: list[str]
    measures: list[str]
    curve_title: str
    step_title: str
    searched: bool


@dataclass(frozen=True)
class Look:
    """Where a line stands along x, and how it is drawn."""

    x: float
    colour: Any
    style: Any
    mark: str
    group: str  # lines of one group are joined along x


def draw(figures: Figures, path: Path) -> None:
    """Write the picture as the kind of file that the path's name says (png, svg). Raises OSError."""
    with warnings.catch_warnings(), rc_context(LOOK):
        warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box
        figure = _figure(figures)
        FigureCanvasAgg(figure)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=130, metadata=metadata, facecolor="white")


def _figure(figures: Figures) -> Figure:
    measures = _chosen(figures)
    key = _along(figures)
    keys = figures.swept if figures.searched else [key] if key else []
    panels: list[tuple[str, str | None]] = [(measures[0], k) for k in keys] if measures and keys else []
    panels += [(measure, key) for measure in measures[1 if panels else 0 :]]
    span = (COLUMNS if len(panels) % COLUMNS == 0 else 2) if any(line.curves for line in figures.lines) else 0
    rows = max(math.ceil((len(panels) + span) / COLUMNS), 1)
    figure = Figure(
        figsize=(CELL[0] * COLUMNS, CELL[1] * rows + 0.3), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    grid = figure.add_gridspec(rows, COLUMNS)
    looks = _looks(figures, key)
    if span:
        _curves(figure.add_subplot(grid[0, :span]), figures, looks, key)
    for n, (measure, along) in enumerate(panels, span):
        axes = figure.add_subplot(grid[divmod(n, COLUMNS)])
        if along is None:
            _bars(axes, figures, measure, looks)
        else:
            places = zip(looks, _looks(figures, along), strict=True)
            _against(axes, figures, measure, along, [replace(look, x=place.x) for look, place in places])
    if any(half is not None for line in figures.lines for _, half, _ in line.measures.values()):
        figure.supxlabel("mean of the seeds with its 95 % Student-t interval; small dots: each seed", fontsize=8.5)
    return figure


def _chosen(figures: Figures) -> list[str]:
    """The measures that get a panel: the first of each wanted kind; else whatever there is."""
    found = [
        next((m for m in figures.measures if m == w or (w[-2:] == ": " and m.startswith(w))), None) for w in PANELS
    ]
    if figures.searched and found[0] is None and "training reward" in figures.measures:
        found[0] = "training reward"  # what was searched by
    chosen = [measure for measure in found if measure]
    own = [m for m in figures.measures if ": valid/" in m]
    return chosen or own[:4] or figures.measures[:4]


def _along(figures: Figures) -> str | None:
    """The swept key with most values."""
    counts = {key: len({_text(line.values.get(key)) for line in figures.lines}) for key in figures.swept}
    return max(counts, key=lambda key: counts[key]) if counts else None


def _looks(figures: Figures, key: str | None) -> list[Look]:
    count = len(figures.lines)
    if key is None:
        return [
            Look(float(n), FEW[n % len(FEW)] if count <= len(FEW) else _shade(n, count), "-", "o", "")
            for n in range(count)
        ]
    seen = list(
        dict.fromkeys(_text(line.values.get(key)) for line in sorted(figures.lines, key=lambda li: _order(li, key)))
    )
    others = [_others(line, key) for line in figures.lines]
    groups = list(dict.fromkeys(others)) if not figures.searched else [""]
    looks = []
    for line, other in zip(figures.lines, others, strict=True):
        place = seen.index(_text(line.values.get(key)))
        value = line.values.get(key)
        x = float(value or 0) if figures.searched and _numeric(figures, key) else float(place)
        group = 0 if figures.searched else groups.index(other)
        shift = 0.0 if figures.searched else 0.08 * (group - (len(groups) - 1) / 2)
        style, mark = STYLES[group % len(STYLES)], MARKS[group % len(MARKS)]
        looks.append(Look(x + shift, _shade(place, len(seen)), style, mark, "" if figures.searched else other))
    return looks


def _curves(axes: Axes, figures: Figures, looks: Sequence[Look], key: str | None) -> None:
    """One line a row, the mean of its seeds at each step, in a band from the lowest seed to the highest."""
    several = False
    for line, look in zip(figures.lines, looks, strict=True):
        at: dict[int, list[float]] = {}
        for curve in line.curves:
            for step, value in curve:
                at.setdefault(step, []).append(value)
        steps = sorted(at)
        if not steps:
            continue
        several = several or len(line.curves) > 1
        means = [fmean(at[step]) for step in steps]
        mark = "o" if len(steps) < 3 else None
        axes.plot(
            steps, means, color=look.colour, linestyle=look.style, linewidth=1.7, marker=mark, label=_plain(line.label)
        )
        if len(line.curves) > 1:
            low, high = [min(at[s]) for s in steps], [max(at[s]) for s in steps]
            axes.fill_between(steps, low, high, color=look.colour, alpha=0.13, linewidth=0)
    axes.set_title(figures.curve_title + ("; band: lowest to highest seed" if several else ""))
    axes.set_xlabel(figures.step_title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(figures.lines) <= LEGEND:
        axes.legend(ncols=1 if len(figures.lines) < 6 else 2, loc="best")
    elif key:
        _colour_legend(axes, figures, looks, key)


def _colour_legend(axes: Axes, figures: Figures, looks: Sequence[Look], key: str) -> None:
    """For many lines: what the colours mean, at a few values, and what the line styles mean."""
    ordered = sorted(zip(figures.lines, looks, strict=True), key=lambda pair: _order(pair[0], key))
    colours = {_text(line.values.get(key)): look.colour for line, look in ordered}
    picks = sorted({round(n * (len(colours) - 1) / 4) for n in range(5)})
    for name in (list(colours)[p] for p in picks):
        axes.plot([], [], color=colours[name], linewidth=4, label=_plain(f"{key}={name}"))
    for group, look in {look.group: look for look in looks if look.group}.items():
        axes.plot([], [], color="#555555", linestyle=look.style, label=_plain(group))
    handles, labels = axes.get_legend_handles_labels()
    skip = sum(bool(line.curves) for line in figures.lines)
    axes.legend(handles[skip:], labels[skip:], loc="best")


def _against(axes: Axes, figures: Figures, measure: str, key: str, looks: Sequence[Look]) -> None:
    """A measure with its interval, and each seed's value as a dot, against a swept key."""
    for group in dict.fromkeys(look.group for look in looks):
        points = [
            (look, line.measures[measure])
            for line, look in zip(figures.lines, looks, strict=True)
            if look.group == group and measure in line.measures
        ]
        points.sort(key=lambda point: point[0].x)
        if points and not figures.searched:
            places, means = [look.x for look, _ in points], [found[0] for _, found in points]
            axes.plot(places, means, color="#b5b5b5", linestyle=points[0][0].style, linewidth=1.2, zorder=1.5)
        for look, (mean, half, values) in points:
            options: dict[str, Any] = {"markersize": 6, "capsize": 3, "elinewidth": 1.4}
            axes.errorbar([look.x], [mean], yerr=half, fmt=look.mark, color=look.colour, **options)
            if len(values) > 1:
                axes.plot([look.x] * len(values), values, ".", color=look.colour, markersize=4, alpha=0.45)
    if measure == "λ-return bias":
        axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_title(_plain(_title(measure)))
    axes.set_xlabel(_plain(key))
    _ticks(axes, figures, key)


def _ticks(axes: Axes, figures: Figures, key: str) -> None:
    if figures.searched and _numeric(figures, key):
        values = [float(line.values[key]) for line in figures.lines if key in line.values]
        if min(values) > 0 and max(values) / min(values) >= 30:
            axes.set_xscale("log")
        return
    names = list(
        dict.fromkeys(_text(line.values.get(key)) for line in sorted(figures.lines, key=lambda li: _order(li, key)))
    )
    long = max(len(name) for name in names) * len(names) > 34
    axes.set_xticks(
        range(len(names)), [_plain(n) for n in names], rotation=25 if long else 0, ha="right" if long else "center"
    )
    axes.set_xlim(-0.5, len(names) - 0.5)


def _bars(axes: Axes, figures: Figures, measure: str, looks: Sequence[Look]) -> None:
    """A bar a run below its name, the first at the top; a run without the measure has a dash."""
    for n, (line, look) in enumerate(zip(figures.lines, looks, strict=True)):
        place = axes.get_yaxis_transform()
        axes.text(0.0, n - 0.27, _plain(line.label), transform=place, fontsize=7.5, color="#555555")
        if measure not in line.measures:
            axes.text(0.0, n + 0.02, "-", transform=place, va="center", color="#555555")
            continue
        value, half, _ = line.measures[measure]
        axes.barh(n, value, color=look.colour, height=0.42, xerr=half, error_kw={"elinewidth": 1.2, "capsize": 3})
        axes.annotate(
            f"{value:.3g}",
            (value, n),
            xytext=(4 if value >= 0 else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=8.5,
            color="#333333",
        )
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.margins(x=0.22)
    axes.set_yticks([])
    axes.set_ylim(len(figures.lines) - 0.6, -0.65)
    axes.set_title(_plain(_title(measure)))


def _title(measure: str) -> str:
    return f"held-out {measure}" if measure.startswith(KINDS) else measure


def _shade(place: int, count: int) -> Any:
    return colormaps["viridis"](0.88 * place / max(count - 1, 1))


def _order(line: Line, key: str) -> tuple[int, float, str]:
    value = line.values.get(key)
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, _text(value))


def _others(line: Line, key: str) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in line.values.items() if name != key)


def _numeric(figures: Figures, key: str) -> bool:
    values = [line.values.get(key) for line in figures.lines]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text as it stands, long names cut in the middle: a dollar sign begins no formula."""
    short = text if len(text) <= 44 else f"{text[:20]}...{text[-21:]}"
    return short.replace("$", r"\$")
