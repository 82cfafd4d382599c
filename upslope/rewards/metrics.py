"""Ready functions of (prompts, completions, rows): usable as rewards, and as judges that no policy trains on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

Rows = Sequence[dict[str, Any]]


@cache
def _lexicon() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def vader(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """Sentiment of each completion by VADER's lexicon, from -1 to 1 (compound score; Hutto and Gilbert 2014)."""
    return [float(_lexicon().polarity_scores(text)["compound"]) for text in completions]


def length_words(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """Words of each completion."""
    return [float(len(text.split())) for text in completions]


def distinct_words(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """Share of each completion's words that are different ones; 0 for an empty one."""
    return [distinct_n([text], 1) for text in completions]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words among all n-grams of the texts; 0 where there is none. Li et al. 2016 (1510.03055)."""
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        grams = n_grams(text, n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """The runs of n words in a text, in lower case."""
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
