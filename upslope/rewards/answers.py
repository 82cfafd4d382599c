"""How right an answer is: exact match, token F1, accuracy of a label, edit similarity; the best reference counts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from upslope.rewards.reference import references

Rows = Sequence[dict[str, Any]]
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra space: SQuAD's. Rajpurkar et al. 2016 (1606.05250)."""
    bare = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """1 where a completion is a reference after SQuAD's normalisation, else 0."""
    return _best(completions, rows, lambda text, reference: float(normalised(text) == normalised(reference)))


def token_f1(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """F1 of the words of a completion and a reference after SQuAD's normalisation; two empty ones agree."""
    return _best(completions, rows, _token_f1)


def accuracy(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """1 where a completion, stripped, is the reference letter for letter, else 0."""
    return _best(completions, rows, lambda text, reference: float(text.strip() == reference.strip()))


def edit_similarity(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """1 - edits / length of the longer, in characters of a completion and a reference, stripped. Levenshtein 1966."""
    return _best(
        completions,
        rows,
        lambda text, reference: float(Levenshtein.normalized_similarity(text.strip(), reference.strip())),
    )


def _best(completions: Sequence[str], rows: Rows, score: Callable[[str, str], float]) -> list[float]:
    return [
        max(score(text, reference) for reference in references(row))
        for text, row in zip(completions, rows, strict=True)
    ]


def _token_f1(text: str, reference: str) -> float:
    here, there = normalised(text).split(), normalised(reference).split()
    if not here or not there:
        return float(here == there)
    common = sum((Counter(here) & Counter(there)).values())
    return 2 * common / (len(here) + len(there))
