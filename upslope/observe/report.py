"""report.html: one file that opens offline, made from events.jsonl alone.

Data is embedded as JSON and put on the page as text by assets/report.js: what a model wrote is never markup.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upslope.errors import RunError
from upslope.observe.events import read_events

HERE = Path(__file__).parent
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{chart_css}</style>
<style>{css}</style>
</head>
<body>
<main id="page"></main>
<script id="data" type="application/json">{data}</script>
<script>{chart_js}</script>
<script>{js}</script>
</body>
</html>
"""


def write_report(run: Path) -> Path:
    """Write report.html of a run folder, finished or not; returns its path. Raises RunError."""
    if not (run / "events.jsonl").is_file():
        raise RunError(
            f"{run} is not a run folder: it has no events.jsonl", "name the folder that a run was written to"
        )
    data = collect(read_events(run / "events.jsonl"))
    data["made"] = time.strftime("%Y-%m-%d %H:%M")
    data["model"] = _model_named(data["run"].get("recipe", {}).get("model"))
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    name = str(data["run"].get("recipe", {}).get("name", run.name))
    html = PAGE.format(
        title=f"{_escape(name)} - upslope",
        chart_css=_read("vendor/uPlot.min.css"),
        css=_read("assets/report.css"),
        chart_js=_read("vendor/uPlot.iife.min.js"),
        js=_read("assets/report.js"),
        data=embedded,
    )
    path = run / "report.html"
    try:
        path.write_bytes(html.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}", "free space or mend its permissions") from None
    return path


def _model_named(model: Any) -> str:
    """Where the model came from: its source, or of a new one kind and size."""
    if isinstance(model, Mapping):
        return f"a new {model.get('kind')}, {model.get('layers')} layers of width {model.get('width')}"
    return str(model or "")


def collect(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows, from the events in order: curves by stage and metric, tables, prompts, samples."""
    data: dict[str, Any] = {
        "run": {},
        "stages": {},
        "tables": [],
        "prompts": [],
        "samples": [],
        "alarms": [],
        "accounts": [],
    }
    for event in events:
        kind, stage = event["kind"], event.get("stage", "run")
        if kind == "run":
            data["run"] = event
        elif kind in ("step", "eval"):
            curves = data["stages"].setdefault(stage, {}).setdefault("curves", {})
            for name, value in event["metrics"].items():
                curves.setdefault(name, []).append([event["step"], value])
        elif kind == "stage":
            data["stages"].setdefault(stage, {})["seconds"] = event.get("seconds")
            data["stages"][stage]["metrics"] = event.get("metrics", {})
        elif kind == "table":
            data["tables"].append(event)
        elif kind == "prompts":
            data["prompts"] = event["samples"]
        elif kind == "samples":
            data["samples"].append({"step": event["step"], "samples": event["samples"]})
        elif kind == "alarm":
            data["alarms"].append(event)
        elif kind == "account":
            data["accounts"].append({"stage": stage, "text": event["text"]})
    return data


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
