"""Which language a completion is in, by py3langid (Lui and Baldwin 2012). Its own module: it reads a model at start."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

Rows = Sequence[dict[str, Any]]


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(prompts: Sequence[str], completions: Sequence[str], rows: Rows, *, code: str) -> list[float]:
    """The probability that each completion is in the language of two letters; 0 for one without letters.

    Raises ValueError for a language that py3langid does not know.
    """
    known = set(_identifier().labels)
    if code not in known:
        raise ValueError(f"language {code!r} is none of {', '.join(sorted(known))}")
    return [
        float(dict(_identifier().rank(text))[code]) if any(c.isalpha() for c in text) else 0.0 for text in completions
    ]
