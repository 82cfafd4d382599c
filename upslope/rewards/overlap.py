"""BLEU, chrF, TER by sacrebleu and ROUGE by rouge-score, of single completions, each 0 to 1 (what papers print / 100).

Several references: sacrebleu takes the best match of each n-gram, ROUGE the best reference. BLEU of a sentence is
smoothed and of effective order (Chen and Cherry 2014), or most sentences would score 0; BLEU of a set is in corpus.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU, CHRF, TER

from upslope.rewards.reference import references

Rows = Sequence[dict[str, Any]]
SENTENCE_BLEU = BLEU(effective_order=True)
SENTENCE_CHRF = CHRF()
SENTENCE_TER = TER()


class Words(Tokenizer):  # type: ignore[misc]
    """Lower-case words of any script; on ASCII what rouge-score's own does, which drops every other letter."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge(kind: str) -> RougeScorer:
    return RougeScorer([kind], tokenizer=Words())


def bleu(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """BLEU of each completion, smoothed, effective order. Papineni et al. 2002; sacrebleu, Post 2018."""
    return [
        SENTENCE_BLEU.sentence_score(text, references(row)).score / 100
        for text, row in zip(completions, rows, strict=True)
    ]


def chrf(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """chrF of each completion: F2 of character n-grams up to 6. Popović 2015."""
    return [
        SENTENCE_CHRF.sentence_score(text, references(row)).score / 100
        for text, row in zip(completions, rows, strict=True)
    ]


def ter(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """Translation edit rate: edits and shifts over the reference's words; less is better. Snover et al. 2006."""
    return [
        SENTENCE_TER.sentence_score(text, references(row)).score / 100
        for text, row in zip(completions, rows, strict=True)
    ]


def rouge1(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """F1 of words, each counted as often as it stands. Lin 2004."""
    return _rouge_scores("rouge1", completions, rows)


def rouge2(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """F1 of pairs of neighbouring words. Lin 2004."""
    return _rouge_scores("rouge2", completions, rows)


def rougeL(prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
    """F1 of the longest common subsequence of words. Lin 2004."""
    return _rouge_scores("rougeL", completions, rows)


def _rouge_scores(kind: str, completions: Sequence[str], rows: Rows) -> list[float]:
    scorer = _rouge(kind)
    return [
        float(scorer.score_multi(references(row), text)[kind].fmeasure)
        for text, row in zip(completions, rows, strict=True)
    ]
