"""Rows from files, the hub or Python, as a `datasets` table; what is wrong with a file is told by line number.

A file is read once, in chunks, and its rows never all stand in Python: large tables lie on the disk (arrow.py). Its bad
lines are counted to the end, so that they can be mended at once.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError

from upslope.errors import DataError
from upslope.sources import MADE
from upslope.text.arrow import GrowingTable
from upslope.text.cleaning import ROW_NUMBER
from upslope.text.corpora import corpus
from upslope.text.reasoning import puzzles

BAD_LIMIT = 10_000  # bad lines that are counted
BAD_NAMED = 5  # bad lines, after the first, whose numbers are told
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be read: it is told and gone past."""

    path: Path
    number: int
    what: str
    remedy: str


Row = dict[str, Any] | BadLine


def load_rows(source: Any, *, limit: int | None = None) -> Dataset:
    """A table of rows. source: a csv, tsv, jsonl, json or parquet file (also .gz, .bz2, .xz), a hub id, a Dataset or
    a list of dicts. Raises DataError."""
    if isinstance(source, Dataset):
        table = source
    elif isinstance(source, DatasetDict):
        raise DataError(f"the rows have splits {list(source)}", "give one of them: upslope splits by itself")
    elif isinstance(source, Path) or (isinstance(source, str) and Path(source).exists()):
        return _from_file(Path(source), limit)
    elif isinstance(source, str) and source.startswith(MADE):
        word, _, name = source.partition(":")
        table = _from_list(corpus(name) if word == "corpus" else puzzles(name))
    elif isinstance(source, str):
        table = _from_hub(source)
    else:
        table = _from_list(source)
    if not len(table):
        raise DataError("there are no rows", "give at least one")
    return table.select(range(min(limit, len(table)))) if limit else table


def require_columns(rows: Dataset, names: Sequence[str], source: str) -> None:
    """Raise DataError for a column that is not there, with the nearest name."""
    for name in names:
        if name not in rows.column_names:
            near = difflib.get_close_matches(name, rows.column_names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(column for column in rows.column_names if column != ROW_NUMBER)
            raise DataError(f"{source} has no column {name!r}", f"{hint}it has {known}; name one in the recipe")


def _from_list(source: Any) -> Dataset:
    if not isinstance(source, Sequence) or not all(isinstance(row, dict) for row in source):
        raise DataError(f"rows of type {type(source).__name__}", "give a datasets.Dataset or a list of dicts")
    try:
        return Dataset.from_list(list(source))
    except (TypeError, ValueError) as error:
        raise DataError(f"the rows do not make a table: {error}", "use the same keys and types in every row") from None


def _from_hub(name: str) -> Dataset:
    try:
        return load_dataset(name, split="train")
    except (DatasetNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"no dataset {name!r} here, and the hub does not give it: {reason[:120]}", "check the name"
        ) from None


def _from_file(path: Path, limit: int | None) -> Dataset:
    if path.is_dir():
        raise DataError(f"{path} is a folder", "name a file in it")
    kind = (Path(path.stem).suffix if path.suffix.lower() in OPENERS else path.suffix).lower()
    if kind == ".parquet":
        return _from_parquet(path, limit)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
    if kind not in readers:
        raise DataError(
            f"{path}: files of kind {kind or 'without an ending'} are not read", "use csv, tsv, jsonl, json, parquet"
        )
    table = GrowingTable(path)
    bad: list[BadLine] = []
    try:
        for row in readers[kind](path):
            if isinstance(row, BadLine):
                bad.append(row)
            elif not bad:
                table.add(row)
            if (limit and table.rows >= limit) or len(bad) > BAD_LIMIT:
                break
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}", "check that the file is whole and may be read") from None
    if bad:
        raise _refused(bad)
    if not table.rows:
        raise DataError(f"{path} has no rows", "give it at least one")
    return table.finished()


def _refused(bad: Sequence[BadLine]) -> DataError:
    """One line for all bad ones: what is wrong with the first, how many there are, and where the next few stand."""
    first, rest = bad[0], bad[1:]
    what = f"{first.path}, line {first.number} {first.what}"
    if rest:
        named = ", ".join(str(line.number) for line in rest[:BAD_NAMED])
        named += ", ..." if len(rest) > BAD_NAMED else ""
        what += f" (and {'over ' if len(bad) > BAD_LIMIT else ''}{min(len(rest), BAD_LIMIT)} more lines: {named})"
    return DataError(what, first.remedy)


def _from_parquet(path: Path, limit: int | None) -> Dataset:
    try:
        read = pyarrow.parquet.read_table(path)  # datasets' from_parquet would write a copy into the home folder
        read.validate(full=True)  # text that is no UTF-8 would be an error only where it is looked at
        table = Dataset(read)
    except Exception as error:  # pyarrow raises several kinds for a damaged file
        raise DataError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}", "write it again") from None
    if not len(table):
        raise DataError(f"{path} has no rows", "give it at least one")
    return table.select(range(min(limit, len(table)))) if limit else table


def _open(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise DataError(f"no such file: {path}", "check the path")
    opener = OPENERS.get(path.suffix.lower(), open)
    opened: IO[bytes] = opener(path, "rb")
    return opened


def _lines(path: Path) -> Iterator[str | BadLine]:
    """Decoded lines with their ends, or what is wrong with one that is not UTF-8."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
                yield BadLine(path, number, f"is not UTF-8: {place}", "save the file as UTF-8")


def _whole_lines(path: Path) -> Iterator[str]:
    """Decoded lines, for files that cannot be read on behind a bad one. Raises DataError."""
    for line in _lines(path):
        if isinstance(line, BadLine):
            raise _refused([line])
        yield line


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if isinstance(line, BadLine):
            yield line
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadLine(path, number, f"is not JSON: {error}", "mend or remove that line")
            continue
        if isinstance(row, dict):
            yield row
        else:
            yield BadLine(path, number, f"is a {type(row).__name__}, not an object", "write one {...} a line")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads("".join(_whole_lines(path)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", "mend it, or use jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is not a list of objects", "write [{...}, {...}], or use jsonl")
    yield from rows


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    separator = "\t" if ".tsv" in path.name.lower() else ","
    reader = csv.reader(_whole_lines(path), delimiter=separator, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise DataError(f"{path}, line 1 names the column {twice[0]!r} twice", "give every column its own name")
        for row in reader:
            if not row:
                continue
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            else:
                fields = f"has {len(row)} fields, the header {len(header)}"
                yield BadLine(path, reader.line_num, fields, "mend that line")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}", "mend that line") from None


__all__ = ["load_rows", "require_columns"]
