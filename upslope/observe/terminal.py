"""What a person sees while a run goes on: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 15.0
SHOWN = {  # the metrics worth a place on one line, and their short names
    "loss/total": "loss",
    "valid/loss": "held-out loss",
    "valid/perplexity": "held-out perplexity",
    "valid/pair_accuracy": "held-out accuracy",
    "reward/pair_accuracy": "accuracy",
    "preference/pair_accuracy": "accuracy",
    "preference/margin": "margin",
    "expert/one_sample": "score of one sample",
    "expert/kept": "of what is kept",
    "reward/mean": "reward",
    "kl/reference_per_completion": "KL",
    "policy/entropy": "entropy",
    "policy/clipped": "clipped",
    "critic/explained_variance": "explained variance",
    "length/mean": "length",
}
MARKS = {"waiting": "·", "start": "▸", "skipped": "✓", "end": "✓"}


class Terminal:
    """Shows events and progress. plain: lines without colour or movement; by default when output is no terminal."""

    def __init__(self, plain: bool | None = None) -> None:
        self.plain = not sys.stdout.isatty() if plain is None else plain
        self.console = Console(highlight=False, soft_wrap=self.plain, no_color=self.plain)
        self.live: Live | None = None
        self.stages: dict[str, str] = {}
        self.now: dict[str, Any] = {"stage": "", "done": 0.0, "total": 1.0, "left": None, "phase": ""}
        self.metrics = ""
        self.printed = 0.0

    def start(self, stages: list[str]) -> None:
        self.stages = dict.fromkeys(stages, "waiting")
        if not self.plain:
            self.live = Live(self._picture(), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def stage(self, name: str, status: str) -> None:
        """A stage starts, ends or is skipped."""
        self.stages[name] = status
        if status == "start":
            self.now = {"stage": name, "done": 0.0, "total": 1.0, "left": None, "phase": "loading"}
            self.metrics = ""
        if status == "skipped":
            self.note(f"{name}: finished before, skipped")
        elif self.plain:
            self.console.print(f"{name}: {status}")
        self._refresh()

    def progress(self, stage: str, done: float, total: float, seconds_left: float | None, phase: str) -> None:
        """How far the stage is, and how long the whole run still takes."""
        self.now = {"stage": stage, "done": done, "total": total, "left": seconds_left, "phase": phase}
        if self.plain and (time.monotonic() - self.printed >= PLAIN_EVERY_S):
            self.printed = time.monotonic()
            left = f", {duration(seconds_left)} left in all" if seconds_left is not None else ""
            self.console.print(f"{stage}: {100 * done / total:3.0f} %{left}, {phase}  {self.metrics}", markup=False)
        self._refresh()

    def event(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind in ("step", "eval"):
            found = [f"{SHOWN[n]} {v:.3g}" for n, v in event["metrics"].items() if n in SHOWN and v is not None]
            found += [f"{n} {v:.3g}" for n, v in event["metrics"].items() if _is_task(n) and v is not None]
            self.metrics = "  ".join(found)
            if kind == "eval":
                self.note(f"{event.get('stage', '')}: {self.metrics}")
        elif kind == "account":
            self.note(event["text"])
        elif kind == "alarm":
            step = f", step {event['step']}" if event.get("step") is not None else ""
            self.note(f"ALARM {event.get('stage', '')}{step}: {event['message']}", style="bold red")
        elif kind == "table":
            self._print(_table(event))
            self.note(event["note"], style="dim")
        elif kind == "samples":
            sample = event["samples"][0]
            self.note(f"best of step {event['step']}: {sample['prompt']} |{sample['completion']}", style="italic")
        elif kind == "prompts":
            self._prompts(event["samples"])
        self._refresh()

    def note(self, text: str, style: str = "") -> None:
        """One line that stays."""
        self._print(Text(text, style="" if self.plain else style))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _prompts(self, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            self.note(f"\n{sample['prompt']} ...", style="bold")
            for side, style in (("before", "dim"), ("after", "")):
                place = 0 if side == "before" else 1
                shown = {n.split(": ")[-1]: v[place] for n, v in sample["scores"].items()}
                scores = "  ".join(f"{n} failed" if v is None else f"{n} {v:+.2f}" for n, v in shown.items())
                self.note(f"  {side:7}{sample[side].strip()}   ({scores})", style=style)

    def _print(self, what: RenderableType) -> None:
        self.console.print(what)

    def _refresh(self) -> None:
        if self.live is not None:
            self.live.update(self._picture())

    def _picture(self) -> RenderableType:
        line = Text("  ".join(f"{MARKS.get(status, '·')} {name}" for name, status in self.stages.items()), style="bold")
        now = self.now
        bar = Table.grid(padding=(0, 1))
        left = f"{duration(now['left'])} left in all" if now["left"] is not None else "measuring the time left"
        share = f"{100 * now['done'] / now['total']:3.0f} %"
        bar.add_row(
            f"{now['stage']:8}",
            ProgressBar(total=now["total"], completed=now["done"], width=20),
            share,
            left,
            now["phase"],
        )
        return Group(line, bar, Text(self.metrics, style="cyan"))


def _is_task(name: str) -> bool:
    """Whether a metric is one of [task], not a bound of its interval."""
    return name.startswith("task/") and not name.endswith(("_low", "_high"))


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _table(event: dict[str, Any]) -> Table:
    table = Table(title=event["title"], title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
    for number, name in enumerate(event["columns"]):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")  # never cut a number
    for row in event["rows"]:
        table.add_row(*(Text(str(cell).replace(" [", "\n[")) for cell in row))  # the interval below its value
    return table
