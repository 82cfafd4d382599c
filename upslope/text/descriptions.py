"""What Debian says of its packages: a line of synopsis, and paragraphs of description.

`corpus:descriptions` has both in English, `corpus:synopses` the lines in German and English.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from upslope.sources import apt_index

CHECKSUM = "Description-md5"


def descriptions() -> Iterator[dict[str, Any]]:
    """Each package's description (its first paragraph) and synopsis, with package, source and section.

    A paragraph is taken up to a list or a drawing (lines that are indented further). source: the source package that
    it is built from; packages of one source repeat each other. What names no source in the list of packages is its own.
    """
    packages, translations = apt_index("en")
    about = {fields["Package"]: fields for fields in _stanzas(packages)}
    for fields in _stanzas(translations):
        name = fields["Package"]
        known = about.get(name, {})
        yield {
            "description": first_paragraph(fields.get("Description-en", "").partition("\n")[2]),
            "synopsis": _synopsis(fields, "en"),
            "package": name,
            "source": _source(name, known),
            "section": known.get("Section", "").rpartition("/")[2],
        }


def synopses() -> Iterator[dict[str, Any]]:
    """Each package's synopsis in German and English, with package and source: the same said twice, often by formula.

    The two are one text's where they bear the same checksum of the English description.
    """
    packages, translations = apt_index("de")
    about = {fields["Package"]: fields for fields in _stanzas(packages)}
    english = {fields[CHECKSUM]: fields for fields in _stanzas(apt_index("en")[1]) if CHECKSUM in fields}
    for fields in _stanzas(translations):
        if same := english.get(fields.get(CHECKSUM, "")):
            name = fields["Package"]
            yield {
                "german": _synopsis(fields, "de"),
                "english": _synopsis(same, "en"),
                "package": name,
                "source": _source(name, about.get(name, {})),
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


def _source(package: str, known: dict[str, str]) -> str:
    """The source package, from what the list of packages says of this one; a version may stand behind its name."""
    return (known.get("Source") or package).partition(" ")[0]


def _synopsis(fields: dict[str, str], language: str) -> str:
    return fields.get(f"Description-{language}", "").partition("\n")[0].strip()


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
