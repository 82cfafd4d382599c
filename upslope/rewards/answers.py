"""How right an answer is: exact match, token F1, accuracy of a label, edit similarity; the best reference counts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from upslope.errors import DataError
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


def weighted_accuracy(
    prompts: Sequence[str], completions: Sequence[str], rows: Rows, *, weights: Mapping[str, float]
) -> list[float]:
    """The weight of the reference where a completion is it (as for accuracy), else 0: see `weights_of`."""
    right = accuracy(prompts, completions, rows)
    return [weights[references(row)[0].strip()] * score for row, score in zip(rows, right, strict=True)]


def weights_of(train: Rows, weights: str | Mapping[str, float]) -> dict[str, float]:
    """What a right answer is worth, by its reference, so that the mean over the training rows is 1 if all are right.

        w_c / mean of w over the training rows,   "balanced": w_c = 1 / number of training rows with reference c

    Balanced, the mean score is the mean over references of their recall, where these are as frequent as in training.
    Raises DataError for a reference without a weight, and for a weight that no reference has.
    """
    counts = Counter(references(row)[0].strip() for row in train)
    given = {name: 1 / count for name, count in counts.items()} if isinstance(weights, str) else dict(weights)
    strange = sorted(given.keys() ^ counts.keys())
    if strange:
        which = "a weight and no row" if strange[0] in given else "rows and no weight"
        raise DataError(
            f"the reference {strange[0]!r:.60} has {which} on the training side", "mend task.weights, or say balanced"
        )
    mean = sum(given[name] * count for name, count in counts.items()) / sum(counts.values())
    return {name: weight / mean for name, weight in given.items()}


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
