"""Metrics of a whole set of completions, where the mean of single scores is another number.

Each function takes the completions and their rows once and returns a statistic: of the indices of some completions
(with repeats, as a bootstrap draws them) to a number, from counts that are made once and only added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF, TER

from upslope.rewards.metrics import n_grams
from upslope.rewards.reference import all_references

Rows = Sequence[dict[str, Any]]
Statistic = Callable[[np.ndarray], float]


def corpus_bleu(completions: Sequence[str], rows: Rows) -> Statistic:
    """BLEU of the set, 0 to 1: n-gram counts are added before they are divided. Papineni et al. 2002."""
    return _from_counts(BLEU(force=True), completions, rows)


def corpus_chrf(completions: Sequence[str], rows: Rows) -> Statistic:
    """chrF of the set, 0 to 1: counts are added first. Popović 2015."""
    return _from_counts(CHRF(), completions, rows)


def corpus_ter(completions: Sequence[str], rows: Rows) -> Statistic:
    """TER of the set: edits of all over words of all references. Snover et al. 2006."""
    return _from_counts(TER(), completions, rows)


def macro_f1(completions: Sequence[str], rows: Rows) -> Statistic:
    """`mean_f1` over the labels of the references; the answer is the stripped text.

    An answer that is no label is wrong for the label it should have been.
    """
    label = [texts[0].strip() for texts in all_references(rows)]
    names = sorted(set(label))
    place = {name: n for n, name in enumerate(names)}
    true_P = np.array([place[name] for name in label])
    said_P = np.array([place.get(text.strip(), len(names)) for text in completions])
    return lambda i: mean_f1(true_P[i], said_P[i], len(names))


def mean_f1(true_P: np.ndarray, said_P: np.ndarray, labels: int) -> float:
    """The mean over labels of F1 = 2 TP / (2 TP + FP + FN), from numbers of labels; `labels` is the number of none.

    A label that is neither true nor said of anything has no part in the mean.
    """
    true, said, right = (
        np.bincount(numbers, minlength=labels)[:labels] for numbers in (true_P, said_P, true_P[true_P == said_P])
    )
    seen = true + said > 0
    return float((2 * right[seen] / (true + said)[seen]).mean())


def distinct_1(completions: Sequence[str], rows: Rows) -> Statistic:
    """Different words among all words of the set. Li et al. 2016 (1510.03055)."""
    return _distinct(completions, 1)


def distinct_2(completions: Sequence[str], rows: Rows) -> Statistic:
    """Different pairs of words among all pairs of the set. Li et al. 2016 (1510.03055)."""
    return _distinct(completions, 2)


def _distinct(texts: Sequence[str], n: int) -> Statistic:
    """`metrics.distinct_n` of the texts drawn: each n-gram is given its number once."""
    number: dict[tuple[str, ...], int] = {}
    found = [[number.setdefault(gram, len(number)) for gram in n_grams(text, n)] for text in texts]
    grams, count_P = [np.array(one, dtype=np.int64) for one in found], np.array([len(one) for one in found])

    def statistic(i: np.ndarray) -> float:
        seen, total = np.zeros(len(number), dtype=bool), int(count_P[i].sum())
        seen[np.concatenate([grams[j] for j in np.unique(i)])] = True
        return int(seen.sum()) / total if total else 0.0

    return statistic


def _from_counts(metric: Any, completions: Sequence[str], rows: Rows) -> Statistic:
    """sacrebleu's own counts of each completion, as its significance tests use them, added up for those drawn."""
    texts = all_references(rows)
    most = max(map(len, texts))
    columns = [[one[k] if k < len(one) else None for one in texts] for k in range(most)]
    counts_PK = np.array(metric._extract_corpus_statistics(list(completions), columns), dtype=np.float64)

    def statistic(i: np.ndarray) -> float:
        total_K = counts_PK[i].sum(axis=0)
        return float(metric._compute_score_from_stats(total_K.tolist()).score) / 100

    return statistic


SETS: Mapping[str, Callable[[Sequence[str], Rows], Statistic]] = {
    function.__name__: function for function in (corpus_bleu, corpus_chrf, corpus_ter, macro_f1, distinct_1, distinct_2)
}
