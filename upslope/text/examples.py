"""What a stage learns from, end to end in one buffer with offsets, which lies in a file where it is large.

An example becomes lists when it is asked for. The file has no name any more, so that nothing is left behind, and its
pages are read when they are needed: what a text's tokens cost in memory is the offset of each, 8 bytes an example.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from upslope.errors import DataError

KEPT_BYTES = 1 << 24  # of a buffer that stay in memory
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """Token ids, which of them are learned, and the row they come from."""

    ids: list[int]
    trained: list[bool]
    row: int


@dataclass(frozen=True)
class Pair:
    """Two whole texts, the better one first, which share their first `prompt_length` tokens: the prompt.

    margin: by how much the better one is better, where the data say so.
    """

    chosen: list[int]
    rejected: list[int]
    prompt_length: int = 0
    margin: float = 0.0


class Packed(Sequence[Item], Generic[Item]):
    """A sequence whose items are made when they are asked for; a slice is a list of them."""

    def at(self, i: int) -> Item:
        """Item i, 0 <= i < len."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self.at(i) for i in range(*place.indices(len(self)))]
        return self.at(range(len(self))[place])


class Buffer:
    """Numbers of one type, appended and read in runs; all but the last KEPT_BYTES lie in a file."""

    def __init__(self, code: str) -> None:
        self.recent = array(code)
        self.before = 0  # numbers in the file
        self.file: int | None = None
        self.mapped: Any = None  # a view of the file, made when it is first read

    def __len__(self) -> int:
        return self.before + len(self.recent)

    def extend(self, run: Sequence[int]) -> None:
        """Append a run, which is then read whole. Raises DataError when the disk refuses."""
        self.recent.extend(run)
        if len(self.recent) * self.recent.itemsize <= KEPT_BYTES:
            return
        try:
            self.file = self._open() if self.file is None else self.file
            data = memoryview(self.recent).cast("B")
            while data:
                data = data[os.write(self.file, data) :]
        except OSError as error:
            raise DataError(
                f"cannot keep tokens in {tempfile.gettempdir()}: {error.strerror or error}", "free space or set TMPDIR"
            ) from None
        self.before += len(self.recent)
        self.recent, self.mapped = array(self.recent.typecode), None

    def run(self, start: int, end: int) -> list[int]:
        """What one `extend` appended, or a part of it."""
        if start >= self.before:
            return self.recent[start - self.before : end - self.before].tolist()
        if self.mapped is None:
            assert self.file is not None
            code: Any = self.recent.typecode
            self.mapped = memoryview(mmap.mmap(self.file, 0, prot=mmap.PROT_READ)).cast(code)
        found: list[int] = self.mapped[start:end].tolist()
        return found

    def _open(self) -> int:
        """A file without a name, which ends with this buffer."""
        file, name = tempfile.mkstemp(prefix="upslope-tokens-")
        os.unlink(name)
        weakref.finalize(self, os.close, file)
        return file


class Tokens(Packed[list[int]]):
    """Lists of token ids."""

    def __init__(self) -> None:
        self.ids = Buffer("i")
        self.starts = array("q", [0])

    def append(self, ids: Sequence[int]) -> None:
        self.ids.extend(ids)
        self.starts.append(len(self.ids))

    def at(self, i: int) -> list[int]:
        return self.ids.run(self.starts[i], self.starts[i + 1])

    def __len__(self) -> int:
        return len(self.starts) - 1


class Examples(Packed[Example]):
    """Examples, 5 bytes a token."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.trained = Buffer("b")
        self.rows = array("q")

    def append(self, example: Example) -> None:
        self.tokens.append(example.ids)
        self.trained.extend(example.trained)
        self.rows.append(example.row)

    def at(self, i: int) -> Example:
        trained = self.trained.run(self.tokens.starts[i], self.tokens.starts[i + 1])
        return Example(self.tokens[i], [bool(t) for t in trained], self.rows[i])

    def __len__(self) -> int:
        return len(self.rows)


class Pairs(Packed[Pair]):
    """Pairs, 4 bytes a token."""

    def __init__(self) -> None:
        self.chosen, self.rejected = Tokens(), Tokens()
        self.prompts, self.margins = array("q"), array("d")

    def append(self, pair: Pair) -> None:
        self.chosen.append(pair.chosen)
        self.rejected.append(pair.rejected)
        self.prompts.append(pair.prompt_length)
        self.margins.append(pair.margin)

    def at(self, i: int) -> Pair:
        return Pair(self.chosen[i], self.rejected[i], self.prompts[i], self.margins[i])

    def __len__(self) -> int:
        return len(self.prompts)
