"""Rows kept or dropped, and split, with an account of every one that was dropped.

Both functions return (rows, Account) and raise DataError, naming the chief reason, when nothing is left.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from upslope.errors import DataError

ROW_NUMBER = "row_number"  # the column that keeps a row's number in its source
SHOWN = 200  # characters of a dropped row that are kept to be shown
TOLD = 60  # and of one in an error
REMEDIES = {  # beginning of a reason -> what to change where it leaves nothing
    "of another kind": "widen data.keep",
    "outside": "widen data.min_chars and data.max_chars",
    "longer than": "raise data.max_tokens, which prompt and completion share, or name shorter texts",
    "with no more than": "lower data.prompt_words",
    "without": "name a column that has it",
    "with an empty": "name a column of texts",
}


@dataclass
class Account:
    """How many were read and kept, and for each reason how many were dropped, with the first one and its row number.

    Row numbers are those of the source, from 0, before anything was dropped.
    """

    read: int
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    unit: str = "rows"
    extra: str = ""

    def drop(self, reason: str, row: int, what: Any = "") -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, row)
        if reason not in self.shown:
            self.shown[reason] = str(what)[:SHOWN]

    def close(self, kept: int) -> Account:
        """Set what was kept. Raises DataError when it is nothing."""
        self.kept = kept
        if not kept:
            if not self.dropped:
                raise DataError(f"no {self.unit} left of {self.read}: there were none", "add rows")
            reason = max(self.dropped, key=lambda r: self.dropped[r])
            what = " ".join(self.shown[reason].split())[:TOLD]
            count = f"{self.dropped[reason]} of {self.read}; row {self.first[reason]}{f': {what!r}' if what else ''}"
            remedy = next((told for start, told in REMEDIES.items() if reason.startswith(start)), "mend these rows")
            raise DataError(f"no {self.unit} left of {self.read}: {reason} ({count})", f"{remedy}, or add rows")
        return self

    def examples(self) -> list[str]:
        """One dropped row for each reason, in words."""
        told = {reason: f": {what}" if (what := self.shown[reason]) else "" for reason in self.dropped}
        return [f"{reason}: row {self.first[reason]}{what}" for reason, what in told.items()]

    def __str__(self) -> str:
        parts = [f"{count} {reason} (first: row {self.first[reason]})" for reason, count in self.dropped.items()]
        tail = f"; dropped: {', '.join(parts)}" if parts else "; nothing dropped"
        return f"{self.kept} {self.unit} of {self.read}{tail}{self.extra}"


def numbered(rows: Dataset) -> Dataset:
    """The rows with their numbers in a column of their own, unless they have one of that name."""
    return rows if ROW_NUMBER in rows.column_names else rows.add_column(ROW_NUMBER, list(range(len(rows))))


def row_numbers(rows: Dataset) -> Sequence[int]:
    """Each row's number in its source; its place where that is not known."""
    if ROW_NUMBER not in rows.column_names:
        return range(len(rows))
    numbers: list[int] = list(rows[ROW_NUMBER])
    return numbers if all(isinstance(n, int) for n in numbers) else range(len(rows))


def clean(
    rows: Dataset,
    *,
    text: str | None,
    may_be_blank: bool = False,
    min_chars: int = 1,
    max_chars: int = 100_000,
    keep: Mapping[str, Sequence[str]] | None = None,
    dedupe: bool = True,
    required: Sequence[str] = (),
    equal: Sequence[str] = (),
) -> tuple[Dataset, Account]:
    """Keep the rows whose columns have the wanted values, with all that is required, whose text fits and is no repeat.

    text: the column that is measured, of texts or conversations; may_be_blank: of a prompt, which may have no words.
    Texts that differ only in white space or case are repeats; the first stays. equal: the columns that must all agree
    for a row to be a repeat, where that is not the text.
    """
    account = Account(len(rows))
    wanted = {column: {str(v) for v in values} for column, values in (keep or {}).items()}
    equal = tuple(equal) or ((text,) if text else ())
    names = list(dict.fromkeys([*wanted, *required, *([text] if text else []), *equal]))
    chosen, seen = [], set()
    numbers = row_numbers(rows)
    for i, values in enumerate(zip(*(rows[name] for name in names), strict=True) if names else ()):
        row = dict(zip(names, values, strict=True))
        shown = row[text] if text else row
        reason = _unfit(row, wanted, required)
        if not reason and text:
            reason = _misfit(row[text], (min_chars, max_chars), may_be_blank)
        key = _digest("\0".join(folded(str(row[name])) for name in equal)) if dedupe and equal and not reason else None
        if reason:
            account.drop(reason, numbers[i], shown)
        elif key is not None and key in seen:
            account.drop("repeated", numbers[i], shown)
        else:
            seen.add(key)
            chosen.append(i)
    account.close(len(chosen) if names else len(rows))
    return (rows.select(chosen) if names else rows), account


def _unfit(row: Mapping[str, Any], wanted: Mapping[str, set[str]], required: Sequence[str]) -> str | None:
    """Why a row is no use, or None."""
    if any(str(row[column]) not in values for column, values in wanted.items()):
        return "of another kind"
    missing = next((name for name in required if not _is_there(row[name])), None)
    return None if missing is None else f"without {missing}"


def _misfit(value: Any, length: tuple[int, int], may_be_blank: bool) -> str | None:
    """Why a text, or a conversation by what is said in it, is no use, or None."""
    if isinstance(value, list | tuple):
        value = "".join(str(turn.get("content") or "") for turn in value if isinstance(turn, Mapping))
    if isinstance(value, int | float) and _is_there(value):  # a column of numbers, in a template
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        return None if may_be_blank else "without text"
    return None if length[0] <= len(value) <= length[1] else f"outside {length[0]} to {length[1]} characters"


def _is_there(value: Any) -> bool:
    """Whether a value is a text with something in it, a number, or a list of such."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_there(v) for v in value)
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def split(
    rows: Dataset, *, group: str | None, fractions: Mapping[str, float], seed: int, same: str | None = None
) -> tuple[dict[str, Dataset], Account]:
    """Split rows by group, so that no group is on two sides; without groups, so that no row's equal is.

    Without groups, `same` names the column (a text, a prompt) whose equals stay together whatever else a row holds.
    Where a group goes depends on (seed, group) alone: more rows never move it. Raises DataError for an empty side.
    """
    sides: dict[str, list[int]] = {name: [] for name in fractions}
    groups: dict[str, set[bytes]] = {name: set() for name in fractions}
    keys: Iterable[Any]
    if group:
        keys = rows[group]
    elif same:
        keys = (folded(str(value)) for value in rows[same])
    else:
        keys = (folded(str(sorted((c, v) for c, v in row.items() if c != ROW_NUMBER))) for row in rows)
    for i, key in enumerate(keys):
        place, bound = _place(seed, str(key)), 0.0
        side = next(reversed(list(fractions)))
        for name, fraction in fractions.items():
            bound += fraction
            if place < bound:
                side = name
                break
        sides[side].append(i)
        groups[side].add(_digest(str(key)))
    for name, fraction in fractions.items():
        if fraction > 0 and not sides[name]:
            kind = f"different values of {group!r}" if group else "different rows"
            raise DataError(
                f"the {name} side of the split is empty: {sum(map(len, groups.values()))} {kind} in all",
                "add rows, or give that side a larger share in [data]",
            )
    told = ", ".join(f"{n} {len(r)}" + (f" ({len(groups[n])} groups)" if group else "") for n, r in sides.items())
    account = Account(len(rows), extra=f"; {told}").close(len(rows))
    return {name: rows.select(indices) for name, indices in sides.items()}, account


def _digest(text: str) -> bytes:
    """What stands for a text in a set of many: 16 bytes, however long it is."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def folded(text: str) -> str:
    """A text without what makes no difference: case and white space."""
    return " ".join(text.casefold().split())


def _place(seed: int, key: str) -> float:
    """A number in [0, 1) from the seed and a key."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
