"""The picture, and both it and the tables into README.md, between its marks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from benchmarks.table import Measured, aim_text, newest, section, with_unit

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PAGE, PICTURE = FOLDER / "README.md", FOLDER / "results" / "newest.png"
MARK, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
KIND = ("device", "dtype", "threads", "model", "size")


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def groups(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results that may stand in one table: the newest of size full first, which the picture is of, then the others.

    Smoke runs measure nothing.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["size"] != "smoke":
            key = json.dumps([result["machine"], *(result[k] for k in KIND)], sort_keys=True)
            found.setdefault(key, []).append(result)
    return sorted(found.values(), key=lambda g: (g[0]["size"] == "full", max(r["made"] for r in g)), reverse=True)


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Each row as a share of its aim: right of the line it is met, with the extremes of its repeats."""
    shown = [m for m in measured if m.row.aim is not None and min(m.low, m.value) > 0]
    figure = Canvas(figsize=(9, 1.2 + 0.36 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, m in enumerate(reversed(shown)):
        low, middle, high = sorted(share(m, value) for value in (m.low, m.value, m.high))
        colour = "#1b7837" if m.met == "yes" else "#b2182b"
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([middle], [place], "o", color=colour)
        text = f" {with_unit(m.value, m.row.unit)}  ({aim_text(m.row)})"
        axes.annotate(text, (high, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [m.row.title.replace("`", "") for m in reversed(shown)], fontsize=8)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.6)  # room for the figures
    axes.set_xlabel("share of the aim (right of 1: met); dot: median, line: all repeats")
    figure.savefig(path, dpi=120)


def share(m: Measured, value: float) -> float:
    assert m.row.aim is not None
    return value / m.row.aim if m.row.at_least else m.row.aim / value


def write_page(results: Sequence[dict[str, Any]], page: Path = PAGE, picture: Path = PICTURE) -> bool:
    """Put tables and picture of the newest results into the page; False where there is no full result yet."""
    found = groups(results)
    if not found:
        return False
    measured = newest(found[0])
    draw(measured, picture)
    link = picture.relative_to(page.parent).as_posix()
    body = "\n\n".join([section(found[0]), f"![Each figure as a share of its aim]({link})", *map(section, found[1:])])
    text = page.read_text()
    pattern = re.compile(f"{re.escape(MARK)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no {MARK} ... {END} to write between")
    page.write_text(pattern.sub(lambda _: f"{MARK}\n{body}\n{END}", text))
    return True
