"""Verses of a module of the SWORD project, in its form zText: three files for each testament.

bzs   12 bytes a block:  where it stands in bzz, its packed and its plain length       (little-endian, as all of it)
bzv   10 bytes an entry: its block (4), where it stands in the plain block (4), its length (2)
bzz   the blocks, packed by zlib; their text is OSIS

Entries stand in the order of the book: a chapter's opening, then its verses from 1 on, an empty one for none. So
chapter and verse are counted here, and no table of how many verses each chapter has is needed.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

CHAPTER = re.compile(r'<chapter\b[^>]*osisID="([^".]+)\.(\d+)"[^>]*sID=')
BESIDES = re.compile(r"<(note|title|rdg|catchWord)\b[^>]*(?<!/)>.*?</\1>", re.DOTALL)  # what is no word of the verse
GAPS = re.compile(r"<(note|l|lg|lb|div|q|list|item)\b")  # tags that part words even where no space stands
TAG = re.compile(r"<[^>]*>")
Verse = tuple[str, int, int]  # book, chapter, verse


def verses(index: Path, places: Path, packed: Path) -> Iterator[tuple[Verse, str]]:
    """(place, plain text) of each verse of one testament.

    Raises zlib.error, struct.error, UnicodeDecodeError or IndexError for files that are damaged.
    """
    data = packed.read_bytes()
    blocks = [
        zlib.decompress(data[start : start + size]) if size else b""
        for start, size, _ in struct.iter_unpack("<III", index.read_bytes())
    ]
    book, chapter, verse = "", 0, 0
    for block, start, size in struct.iter_unpack("<IIH", places.read_bytes()):
        text = blocks[block][start : start + size].decode()
        opening = CHAPTER.search(text)
        if opening:
            book, chapter, verse = opening[1], int(opening[2]), 0
        elif book:
            verse += 1
            yield (
                (book, chapter, verse),
                plain(text.partition("<chapter")[0]),
            )  # behind a chapter's end stands an appendix


def plain(osis: str) -> str:
    """The words of a verse: without notes, titles and the sign of a paragraph, white space made one.

    A note or the end of a line parts words, and goes before a full stop without a trace.
    """
    text = BESIDES.sub(" ", osis)
    text = TAG.sub("", GAPS.sub(r" <\1", text)).replace("¶", " ")
    return re.sub(r"\s+([.,;:!?”’)])", r"\1", " ".join(html.unescape(text).split()))
