"""Rows made from what packages hold: `corpus:NAME` in [data], one function each. Licences are the packages' own.

| name | columns | from |
|---|---|---|
| spelling | wrong, right, word, typo, family | codespell's real misspellings, put into WordNet's example sentences |
| misspellings | typo, word, family | codespell's real misspellings by themselves, six times as many |
| words | definition, word, words, kind, family | WordNet's glosses of words in use |
| german-english | german, english | sentences of the dictionary ding (the Debian package trans-de-en) |
| senses | sentence, word, family, passages, right | WordNet's examples, and what a word means there (wordnet.py) |
| mail | text, label, thread | SpamAssassin's public mail: ham and spam (labelled.py) |
| newswire | text, topic, source | Reuters' stories of one topic each (labelled.py) |
| dialogue | before, said, reply, conversation, about | pairs of turns of the Chit Chat Challenge (chitchat-dataset) |
| descriptions | description, synopsis, package, source, section | Debian's packages, by apt-get: descriptions.py |
| synopses | german, english, package, source | what Debian's packages are, in a line: descriptions.py |
| bible | king_james, modern, book, chapter, verse | the King James Version beside the World English Bible |

family: the stem of `word` by the Lancaster rules (Paice 1990), which cut deep: receive, receiver and receiving are one
family, of one mistake, and belong on one side of a split.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from email.errors import MessageError
from pathlib import Path
from typing import Any

from upslope.errors import DataError, UpslopeError
from upslope.sources import cache_folder, resolve
from upslope.text.descriptions import descriptions, synopses
from upslope.text.labelled import mail, newswire
from upslope.text.sword import verses
from upslope.text.wordnet import KINDS, WORDNET, draw, family, senses

Row = dict[str, Any]
CODESPELL = "pypi:codespell==2.4.3/codespell_lib/data/dictionary.txt"
DING = "deb:trans-de-en/usr/share/trans/de-en"
KING_JAMES = "deb:sword-text-kjv/usr/share/sword/modules/texts/ztext/engKJV2006eb"
MODERN = "deb:sword-text-web/usr/share/sword/modules/texts/ztext/engWEB2015eb"
MISSPELT = 20  # sentences that misspell one word
CHATS = "pypi:chitchat-dataset==0.9.0/chitchat_dataset/dataset.json"
# what a damaged file comes to in the readers below and those of the other modules
UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, RecursionError),
    *(csv.Error, struct.error, zlib.error, MessageError),
)
PLACEHOLDERS = re.compile(r"\b(sb|sth|etw|jdn|jdm|jds|jmd|o\.s)\b|[/\[\]{}()<>]")


def spelling() -> Iterator[Row]:
    """Sentences with one misspelt word: each WordNet example once, its misspelling by a keyed draw.

    Of a sentence's words the one that has been misspelt least so far is, the first of equals, and none more than
    MISSPELT times: words by chance would be "the" in every seventh sentence, and so would one side of a split by word.
    Only misspellings with a single correction; what is capitalised stays as it is.
    """
    typos: dict[str, list[str]] = {}
    for typo, word in _misspelt():
        typos.setdefault(word, []).append(typo)
    used: Counter[str] = Counter()
    for sentence in dict.fromkeys(_examples()):
        words = [word for word in re.findall(r"\b[a-z]+\b", sentence) if word in typos]
        if words and used[word := min(words, key=lambda word: used[word])] < MISSPELT:
            used[word] += 1
            typo = typos[word][draw(sentence + word, len(typos[word]))]
            wrong = re.sub(rf"\b{word}\b", typo, sentence, count=1)
            yield {"wrong": wrong, "right": sentence, "word": word, "typo": typo, "family": family(word)}


def misspellings() -> Iterator[Row]:
    """Misspelt words and what they should be, whether an example sentence has the word or not."""
    for typo, word in _misspelt():
        yield {"typo": typo, "word": word, "family": family(word)}


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
                yield row | {"family": family(found[0])}


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


def bible() -> Iterator[Row]:
    """Each verse of the King James Version (1769) beside the World English Bible's; empty where that has none.

    The other way round, what only the World English Bible has (its apocrypha) is left out.
    """
    for testament in ("ot", "nt"):
        modern = dict(_verses(MODERN, testament))
        for (book, chapter, verse), text in _verses(KING_JAMES, testament):
            other = modern.get((book, chapter, verse), "")
            yield {"king_james": text, "modern": other, "book": book, "chapter": chapter, "verse": verse}


def dialogue() -> Iterator[Row]:
    """Each turn of a conversation that follows another: what was said before that, what was said, and the reply.

    The messages that one person sends in a row are one turn. A conversation of one turn has no reply and no row.
    """
    for name, conversation in json.loads(Path(resolve(CHATS)).read_text(encoding="utf-8")).items():
        turns = [" ".join(" ".join(part["text"] for part in turn).split()) for turn in conversation["messages"]]
        about = str(conversation.get("prompt", ""))  # the earliest have none
        for before, said, reply in zip(["", *turns], turns, turns[1:], strict=False):
            yield {"before": before, "said": said, "reply": reply, "conversation": name, "about": about}


CORPORA: Mapping[str, Callable[[], Iterator[Row]]] = {
    "spelling": spelling,
    "misspellings": misspellings,
    "words": words,
    "german-english": german_english,
    "senses": senses,
    "mail": mail,
    "newswire": newswire,
    "bible": bible,
    "dialogue": dialogue,
    "descriptions": descriptions,
    "synopses": synopses,
}


def corpus(name: str) -> list[Row]:
    """The rows of a corpus. Raises DataError for a name that there is not and a package that cannot be had or read."""
    if name not in CORPORA:
        near = difflib.get_close_matches(name, CORPORA, 1) or list(CORPORA)
        raise DataError(f"no corpus {name!r}", f"there is {', '.join(near)}")
    try:
        return list(CORPORA[name]())
    except UpslopeError:
        raise
    except UNREADABLE as error:
        what = " ".join(str(error).split())[:120] or "it is damaged"
        raise DataError(
            f"corpus:{name} cannot be made of what its packages hold: {type(error).__name__}: {what}",
            f"remove the damaged one under {cache_folder()}, and it is fetched anew",
        ) from None


def _misspelt() -> Iterator[tuple[str, str]]:
    """(misspelling, word) of codespell's list, where there is one correction, a single word in lower case."""
    for line in _lines(CODESPELL):
        typo, arrow, word = line.strip().partition("->")
        if arrow and word.isalpha() and typo.isalpha() and word.islower():
            yield typo, word


def _glosses(kind: str) -> Iterator[tuple[str, str]]:
    """(offset, gloss) of each meaning of one kind of word."""
    for line in _lines(f"{WORDNET}/data.{kind}"):
        if line[:1].isdigit():
            yield line[:8], line.partition(" | ")[2].strip()


def _verses(module: str, testament: str) -> Iterator[tuple[tuple[str, int, int], str]]:
    index, places, packed = (Path(resolve(f"{module}/{testament}.{end}")) for end in ("bzs", "bzv", "bzz"))
    yield from verses(index, places, packed)


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
