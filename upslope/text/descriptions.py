"""What Debian says of its packages: one line of synopsis, and paragraphs of description. `corpus:descriptions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from upslope.sources import apt_index


def descriptions() -> Iterator[dict[str, Any]]:
    """Each package's description (its first paragraph) and synopsis, with package, source and section.

    A paragraph is taken up to a list or a drawing (lines that are indented further). source: the source package that
    it is built from; packages of one source repeat each other. What names no source in the list of packages is its own.
    """
    packages, translations = apt_index("en")
    about = {fields["Package"]: fields for fields in _stanzas(packages)}
    for fields in _stanzas(translations):
        synopsis, _, rest = fields.get("Description-en", "").partition("\n")
        name = fields["Package"]
        known = about.get(name, {})
        yield {
            "description": first_paragraph(rest),
            "synopsis": synopsis.strip(),
            "package": name,
            "source": (known.get("Source") or name).partition(" ")[0],
            "section": known.get("Section", "").rpartition("/")[2],
        }


def first_paragraph(body: str) -> str:
    """The first paragraph of a description: " ." alone ends it, and a line that is indented by more than one space."""
    lines: list[str] = []
    for line in body.split("\n"):
        if not line.strip(" .") or line.startswith("  "):
            if lines:
                break
            continue
        lines.append(line.strip())
    return " ".join(" ".join(lines).split())


def _stanzas(paths: Sequence[Path]) -> Iterator[dict[str, str]]:
    """The fields of each package in apt's lists, of one that several have the first. A space goes on with a field."""
    seen: set[str] = set()
    for path in paths:
        for stanza in _paragraphs(path):
            fields: dict[str, str] = {}
            key = ""
            for line in stanza:
                if line[0] in " \t":
                    fields[key] = f"{fields.get(key, '')}\n{line}"
                else:
                    key, _, value = line.partition(":")
                    fields[key] = value.strip()
            if "Package" in fields and fields["Package"] not in seen:
                seen.add(fields["Package"])
                yield fields


def _paragraphs(path: Path) -> Iterator[list[str]]:
    lines: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                lines.append(line.rstrip("\n"))
            elif lines:
                yield lines
                lines = []
    if lines:
        yield lines
