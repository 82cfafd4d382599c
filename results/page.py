"""docs/results.md and docs/results.zh.md: what stands between their marks is made from the records."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results.plan import LANGUAGES, Group
from results.table import Outcome, Record, outcomes
from results.words import WORDS
from upslope.errors import RunError
from upslope.evaluate import Estimate

FOLDER = Path(__file__).parent
PAGES = FOLDER.parent / "docs"
NOTES = FOLDER / "notes.toml"
FILES = {"en": "results.md", "zh": "results.zh.md"}
MARK, END = "<!-- results -->", "<!-- /results -->"
Notes = Mapping[str, Mapping[str, str]]


def write_pages(groups: Sequence[Group], records: Mapping[str, Record], folder: Path) -> None:
    """Put what the records say between the marks of both pages. Raises RunError for a page without marks."""
    found, notes = outcomes(groups, records), read_notes()
    for language in LANGUAGES:
        page = folder / FILES[language]
        text = page.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(MARK)}.*?{re.escape(END)}", re.DOTALL)
        if not pattern.search(text):
            raise RunError(f"{page} has no {MARK} ... {END}", "put both in, each on a line of its own")
        body = made(found, notes, language)
        before, after = pattern.split(text, maxsplit=1)
        page.write_text(f"{before}{MARK}\n{body}\n{END}{after}", encoding="utf-8")


def read_notes(path: Path = NOTES) -> Notes:
    """GROUP or GROUP-ARM -> a paragraph in every language, on what a row's figures do not say."""
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def made(found: Sequence[Outcome], notes: Notes, language: str) -> str:
    """All sections in one language."""
    rows = [o for o in found if o.group.kind == "row" and o.records]
    studies = [o for o in found if o.group.kind == "study" and o.records]
    parts = [outcome_table(rows, language), *remarks(rows, notes, language), cost_table(rows, language)]
    for name in dict.fromkeys(o.group.name for o in studies):
        parts += study([o for o in studies if o.group.name == name], notes, language)
    parts.append(others_table(rows, language))
    return "\n\n".join([*parts, *samples(rows, language), waiting(found, language), commands(found, language)])


def outcome_table(rows: Sequence[Outcome], language: str) -> str:
    """A line an algorithm: baseline, supervised start, RL, the change between these two."""
    lines = []
    for o in rows:
        change = o.figure("change")
        told = change.text(3, signed=True) if change else "-"
        lines.append(
            [
                o.group.title[language],
                o.group.model[language],
                f"`{o.group.metric}`",
                o.arm.name,
                f"{len(o.records)}",
                f"{sum(r['prompts'] for r in o.records)}",
                *(_shown(o.figure(label)) for label in ("baseline", "before", o.last)),
                f"**{told}**" if o.verdict == "better" else told,
            ]
        )
    return f"## {WORDS['outcomes'][language]}\n\n" + table(WORDS["outcome columns"][language], lines)


def remarks(rows: Sequence[Outcome], notes: Notes, language: str) -> list[str]:
    """The notes on a row and on single algorithms, that one is missing where RL got no better, and the runs' alarms."""
    parts = []
    for name in dict.fromkeys(o.group.name for o in rows):
        arms = [o for o in rows if o.group.name == name]
        if name in notes:
            parts.append(f"**{_titled(arms[0].group, language)}**: {notes[name][language].strip()}")
        for o in arms:
            said = [notes[key][language].strip()] if (key := f"{name}-{o.arm.name}") in notes else []
            if not said and name not in notes and o.verdict != "better":
                said = [WORDS["unexplained"][language]]
            if told := [*said, *_alarms(o, language)]:
                parts.append(f"**{_named(o, language)}**: {' '.join(told)}")
    return parts


def _alarms(o: Outcome, language: str) -> list[str]:
    """Each alarm of the runs once, with the seeds that had it: those that differ in nothing but figures are one."""
    kinds: dict[str, tuple[str, list[int]]] = {}
    for record in o.records:
        for message in record["alarms"]:
            _, seeds = kinds.setdefault(re.sub(r"[-\d.]+", "0", message), (message, []))
            seeds.append(record["seed"])
    sentence = WORDS["alarm"][language]
    return [
        sentence.format(times=len(seeds), seeds=", ".join(map(str, sorted(set(seeds)))), message=_escaped(message))
        for message, seeds in kinds.values()
    ]


def cost_table(rows: Sequence[Outcome], language: str) -> str:
    """What each took: samples, tokens, time, operations, memory, and what it was made with."""
    lines = [[o.group.title[language], o.arm.name, *costs(o)] for o in rows]
    return f"## {WORDS['costs'][language]}\n\n" + table(WORDS["cost columns"][language], lines)


def others_table(rows: Sequence[Outcome], language: str) -> str:
    """What else was measured on the same prompts: the task's other metrics, what was paid for, and its price."""
    lines = []
    for o in rows:
        for name in o.others:
            figures = [o.figure(label, name) for label in ("before", o.last, "change")]
            if not any(figures):  # a choice has no KL that is told
                continue
            told = [f.text(2, signed=n == 2) if f else "-" for n, f in enumerate(figures)]
            lines.append([o.group.title[language], o.group.model[language], o.arm.name, f"`{name}`", *told])
    return f"## {WORDS['others'][language]}\n\n" + table(WORDS["other columns"][language], lines)


def costs(o: Outcome) -> list[str]:
    """Cells of one arm: means over its seeds."""
    newest = max(o.records, key=lambda record: record["made"])
    dirty = "*" if any(record["changed_files"] for record in o.records) else ""
    return [
        f"{o.mean('samples', rl=False):,.0f}",
        f"{o.mean('samples', rl=True):,.0f}",
        f"{o.mean('tokens_read') / 1e6:.2f}",
        f"{o.mean('seconds') / 60:.1f}",
        f"{o.mean('tflop'):.1f}",
        f"{o.mean('peak_gb'):.1f}",
        machine(newest),
        f"{newest['commit'][:7]}{dirty}, {newest['made'][:10]}",
    ]


def machine(record: Record) -> str:
    """The kind of machine, never its name."""
    facts = record["machine"]
    if "gpu" in facts:
        return f"{facts['gpu']}, {facts['dtype']}"
    return f"{facts['processor']}, {facts['threads']} of {facts['cores']} cores, {facts['dtype']}"


def study(arms: Sequence[Outcome], notes: Notes, language: str) -> list[str]:
    """Arms beside each other: what they came to, what was measured on the way, what they took."""
    group = arms[0].group
    lines = []
    for o in arms:
        change = o.figure("change")
        told = [_shown(o.figure(label)) for label in ("before", "after", "expert")]
        measured = [_measured(o.measure(name)) for name in group.columns]
        cells = [o.arm.title[language], f"{len(o.records)}", *told, change.text(3, signed=True) if change else "-"]
        lines.append([*cells, *measured, *costs(o)])
    columns = WORDS["study columns"][language]
    heads = [*columns, *(f"`{name}`" for name in group.columns), *WORDS["cost columns"][language][2:]]
    parts = [f"## {group.title[language]}", table([heads[0], *heads[1:]], lines)]
    metric = WORDS["metric of study"][language].format(metric=group.metric)
    said = notes[group.name][language].strip() if group.name in notes else ""
    return [parts[0], said, metric, parts[1]] if said else [parts[0], metric, parts[1]]


def samples(rows: Sequence[Outcome], language: str) -> list[str]:
    """What models wrote before and after, for one run of every row."""
    parts = [f"## {WORDS['samples'][language]}"]
    for name in dict.fromkeys(o.group.name for o in rows):
        o = next(o for o in rows if o.group.name == name)
        lines = [[_escaped(s[key]) for key in ("prompt", "before", "after")] for s in o.records[0]["shown"]]
        parts += [f"**{_named(o, language)}**", table(WORDS["sample columns"][language], lines)]
    return parts


def waiting(found: Sequence[Outcome], language: str) -> str:
    """The runs of the plan that nobody has recorded yet."""
    own = [o for o in found if o.waiting and o.arm.jobs[0].group == o.group.name]
    words = WORDS["of the runs"][language]
    lines = [f"- {_named(o, language)}: {words.format(n=o.waiting, of=len(o.arm.jobs))}" for o in own]
    said = "\n".join(lines) or WORDS["none waiting"][language]
    return f"## {WORDS['waiting'][language]}\n\n{said}"


def _titled(group: Group, language: str) -> str:
    return ", ".join(part for part in (group.title[language], group.model[language]) if part)


def _named(o: Outcome, language: str) -> str:
    return ", ".join(part for part in (_titled(o.group, language), o.arm.title[language]) if part)


def commands(found: Sequence[Outcome], language: str) -> str:
    """What was typed for every run that is recorded."""
    lines = list(dict.fromkeys(record["command"] for o in found for record in o.records))
    return f"## {WORDS['commands'][language]}\n\n```\n" + "\n".join(lines) + "\n```"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _shown(figure: Estimate | None) -> str:
    return figure.text(3) if figure else "-"


def _measured(figure: Estimate | None) -> str:
    """A mean over seeds; with several, the range over them."""
    if figure is None:
        return "-"
    return (
        f"{figure.value:.3g}"
        if figure.low == figure.high
        else f"{figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})"
    )


def _escaped(text: Any) -> str:
    """A text as a cell of a table: nothing in it is taken for Markdown."""
    one_line = " ⏎ ".join(str(text).strip().splitlines())
    return re.sub(r"([\\`*_\[\]|<>$#~])", lambda m: f"&#{ord(m[1])};", one_line) or "&nbsp;"
