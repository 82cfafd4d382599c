"""A table that grows row by row in little memory: chunks become Arrow, and many of them lie in a file that is mapped.

The file has no name any more when the table is done, so that nothing is left behind; its pages are read when they are
needed and may be given up by the system at any time.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from upslope.errors import DataError

CHUNK_ROWS = 2048
CHUNK_CHARS = 1 << 23  # of text in one chunk, for rows that are long
KEPT_BYTES = 1 << 26  # a smaller table stays in memory


class GrowingTable:
    """Rows of one file. Columns are those of any row; types are those of all rows together. Raises DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.chunk: list[dict[str, Any]] = []
        self.chars = 0
        self.columns: dict[str, None] = {}  # in the order in which they appear
        self.tables: list[pa.Table] = []
        self.schema = pa.schema([])

    def add(self, row: dict[str, Any]) -> None:
        self.chunk.append(row)
        self.rows += 1
        self.chars += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(self.chunk) >= CHUNK_ROWS or self.chars >= CHUNK_CHARS:
            self._close_chunk()

    def finished(self) -> Dataset:
        """All rows, with one type for each column."""
        self._close_chunk()
        try:
            table = pa.concat_tables(_as(table, self.schema) for table in self.tables)
            return Dataset(table, fingerprint=uuid.uuid4().hex[:16])  # its own would be a hash of all the bytes
        except Exception as error:  # as in _close_chunk
            raise self._mixed(error) from None

    def _close_chunk(self) -> None:
        for row in self.chunk:
            self.columns |= dict.fromkeys(row)
        try:
            made = pa.table({name: [row.get(name) for row in self.chunk] for name in self.columns})
            self.schema = pa.unify_schemas([self.schema, made.schema], promote_options="permissive")
        except Exception as error:  # pyarrow raises several kinds for a column of mixed types
            raise self._mixed(error) from None
        self.tables.append(made)
        self.chunk, self.chars = [], 0
        if sum(table.nbytes for table in self.tables if table.num_rows and not _is_mapped(table)) > KEPT_BYTES:
            self._move_to_disk()

    def _move_to_disk(self) -> None:
        """The tables in memory go into one mapped file. Raises DataError when the disk refuses."""
        kept = [table for table in self.tables if not _is_mapped(table)]
        try:
            moved = _mapped(pa.concat_tables(_as(table, self.schema) for table in kept))
        except OSError as error:
            where = tempfile.gettempdir()
            raise DataError(
                f"cannot keep the rows of {self.path} in {where}: {error.strerror or error}", "free space or set TMPDIR"
            ) from None
        self.tables = [*(table for table in self.tables if _is_mapped(table)), moved]

    def _mixed(self, error: Exception) -> DataError:
        """What does not fit, by row (from 0) and column where it stands beside others of its chunk."""
        for name in self.columns:
            first: Any = None
            for n, row in enumerate(self.chunk, self.rows - len(self.chunk)):
                value = row.get(name)
                if isinstance(value, str) and not _is_unicode(value):
                    what = f"row {n}, column {name!r}: half a character in {value!r:.40}"
                    return DataError(f"{self.path}, {what}", "mend that row")
                if value is None or (first is not None and _kind(value) == _kind(first)):
                    continue
                if first is not None:
                    what = f"row {n}, column {name!r} is {value!r:.40}, other rows have {first!r:.40}"
                    return DataError(f"{self.path}, {what}", "give every column one type")
                first = value
        where = f"{self.path}, up to row {self.rows - 1}"
        return DataError(f"{where}: {str(error).splitlines()[0]}", "give every column one type")


def _kind(value: Any) -> type:
    """Types that go into one column count as one."""
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which no encoding writes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


MAPPED = {b"mapped": b"1"}


def _is_mapped(table: pa.Table) -> bool:
    return table.schema.metadata == MAPPED


def _mapped(table: pa.Table) -> pa.Table:
    """The same table, in a nameless file."""
    handle, name = tempfile.mkstemp(prefix="upslope-rows-")
    try:
        with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, table.schema.with_metadata(MAPPED)) as stream:
            stream.write_table(table)
        return pa.ipc.open_stream(pa.memory_map(name)).read_all()
    finally:
        os.unlink(name)


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with all columns of a schema, null where it has none, in the schema's types."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        if column.type != field.type:
            try:
                column = column.cast(field.type)
            except (pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowInvalid):
                column = pa.chunked_array([pa.array(part.to_pylist(), field.type) for part in column.chunks])
        columns.append(column)
    return pa.table(columns, schema=schema)
