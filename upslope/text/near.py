"""Near duplicates: MinHash signatures find candidates, the texts themselves decide.

    J(a, b) = |A n B| / |A u B| of the texts' sets of 5-letter shingles;   P(minhash equal) = J

Broder 1997, "On the resemblance and containment of documents". Two texts are compared where at least one of BANDS bands
of ROWS minima agrees, which texts with J = 0.8 miss once in 5,000 times. Our own, for the libraries that do it bring a
numerical stack of tens of megabytes for these lines.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from datasets import Dataset

from upslope.text.cleaning import Account, folded, row_numbers

SHINGLE = 5  # letters
BANDS, ROWS = 16, 4
PRIME = np.uint64(2**31 - 1)


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """For each text the first one before it that stays and is near it (J >= threshold), None where it stays itself.

    What stays is in order, so that no two that stay are near; only candidates that MinHash misses are overlooked.
    """
    draw = np.random.default_rng(0)
    factor_K, shift_K = (draw.integers(1, 2**31 - 1, size=BANDS * ROWS, dtype=np.uint64) for _ in "ab")
    shingles = lru_cache(4096)(lambda i: _shingles(texts[i]))
    buckets: dict[tuple[int, bytes], list[int]] = {}
    found: list[int | None] = []
    for i in range(len(texts)):
        mine = shingles(i)
        # numbers below 2^32 times factors below 2^31: no product overflows
        minima_K = ((mine[:, None] * factor_K + shift_K) % PRIME).min(axis=0)
        keys = [(band, part.tobytes()) for band, part in enumerate(minima_K.reshape(BANDS, ROWS))]
        candidates = sorted({j for key in keys for j in buckets.get(key, ())})
        near = next((j for j in candidates if _jaccard(mine, shingles(j)) >= threshold), None)
        found.append(near)
        if near is None:
            for key in keys:
                buckets.setdefault(key, []).append(i)
    return found


def without_near(rows: Dataset, column: str, threshold: float) -> tuple[Dataset, Account]:
    """The rows of whose texts no two are near, on whatever side of a split they will stand; the first of each stays."""
    texts, numbers = [str(value) for value in rows[column]], row_numbers(rows)
    account = Account(len(rows))
    chosen = []
    for i, near in enumerate(near_duplicates(texts, threshold)):
        if near is None:
            chosen.append(i)
        else:
            told = f"{texts[i]}  is near row {numbers[near]}:  {texts[near]}"
            account.drop(f"near another, {threshold:g} or more of their shingles", numbers[i], told)
    return rows.select(chosen), account.close(len(chosen))


def resemblance(one: str, other: str) -> float:
    """J of two texts."""
    return _jaccard(_shingles(one), _shingles(other))


def _shingles(text: str) -> np.ndarray:
    """The different shingles of a text, as 32-bit numbers; a text shorter than one is one."""
    data = folded(text).encode("utf-8", "surrogatepass")
    count = max(1, len(data) - SHINGLE + 1)
    return np.unique(np.array([zlib.crc32(data[i : i + SHINGLE]) for i in range(count)], dtype=np.uint64))


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
