"""Each metric against numbers computed by hand, the library's own functions, and what cannot be otherwise."""

import importlib
import math

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from upslope.config.metrics import METRICS, check_source
from upslope.errors import DataError
from upslope.rewards import answers, corpus, overlap
from upslope.rewards.functions import FunctionReward
from upslope.rewards.language import language
from upslope.rewards.metrics import distinct_n

SAID = ["the cat sat on the mat", "a dog", "", "completely different words here"]
TRUE = ["the cat sat on a mat", "the dog", "an answer", "nothing in common at all"]
ROWS = [{"reference": text} for text in TRUE]
EVERYTHING = np.arange(len(SAID))


def test_every_name_is_a_function_that_its_table_describes():
    for name, metric in METRICS.items():
        assert metric.set is None or metric.set in corpus.SETS
        if metric.source and ":" in metric.source and name != "verifier":  # its rows are of a kind of their own
            module, _, function = metric.source.partition(":")
            scores = getattr(importlib.import_module(module), function)(["p"] * 4, SAID, ROWS)
            assert len(scores) == 4 and all(math.isfinite(s) for s in scores), name
            if metric.reference:
                with pytest.raises(ValueError, match=r"row 7 has no reference, but None: set task\.reference"):
                    getattr(importlib.import_module(module), function)(["p"], ["x"], [{"row_number": 7}])


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.reference and m.source and ":" in m.source])
def test_the_reference_itself_is_the_best_answer_and_the_best_of_several_counts(name):
    module, _, function = METRICS[name].source.partition(":")
    score = getattr(importlib.import_module(module), function)
    best = 0.0 if METRICS[name].higher is False else 1.0
    whole = "the cat sat on the mat today"
    assert score(["p"], [whole], [{"reference": whole}]) == [pytest.approx(best)]
    several = score(["p"], [whole], [{"reference": ["quite another text", whole]}])
    assert several == [pytest.approx(best)]
    far = score(["p"], [whole], [{"reference": "quite another text"}])[0]
    assert far > best if best == 0 else far < best


def test_bleu_chrf_and_ter_are_sacrebleus():
    for text, reference in zip(SAID[:2], TRUE, strict=False):
        row = [{"reference": reference}]
        assert overlap.bleu([""], [text], row)[0] == pytest.approx(
            sacrebleu.sentence_bleu(text, [reference]).score / 100
        )
        assert overlap.chrf([""], [text], row)[0] == pytest.approx(
            sacrebleu.sentence_chrf(text, [reference]).score / 100
        )
        assert overlap.ter([""], [text], row)[0] == pytest.approx(sacrebleu.sentence_ter(text, [reference]).score / 100)
    # by hand: one word of six replaced; two words, one of them replaced
    assert overlap.ter(["", ""], SAID[:2], ROWS[:2]) == [pytest.approx(1 / 6), pytest.approx(1 / 2)]


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("corpus_bleu", sacrebleu.corpus_bleu),
        ("corpus_chrf", sacrebleu.corpus_chrf),
        ("corpus_ter", sacrebleu.corpus_ter),
    ],
)
def test_a_set_has_its_own_number_and_it_is_sacrebleus_of_any_draw(name, whole):
    statistic = corpus.SETS[name](SAID, ROWS)
    for drawn in (EVERYTHING, np.array([0, 0, 1, 3]), np.array([1, 1, 1])):
        expected = whole([SAID[i] for i in drawn], [[TRUE[i] for i in drawn]]).score / 100
        assert statistic(drawn) == pytest.approx(expected)
    several = corpus.SETS[name](["a b c d e"] * 2, [{"reference": ["a b c d e", "x"]}, {"reference": "y y"}])
    expected = whole(["a b c d e"] * 2, [["a b c d e", "y y"], ["x", None]]).score / 100
    assert several(np.arange(2)) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 2])
def test_distinct_n_of_drawn_texts_is_that_of_the_texts_themselves(n):
    texts = ["a b A", "b c", "", "a", "d e f a b"]
    statistic = corpus.SETS[f"distinct_{n}"](texts, [{}] * 5)
    for drawn in ([0, 1, 2, 3, 4], [0, 0, 4, 4, 1], [2, 2], [3, 3]):
        assert statistic(np.array(drawn)) == distinct_n([texts[i] for i in drawn], n)


def test_corpus_bleu_by_hand():
    # 4-gram precisions 1 of the one hypothesis of 5 words, the brevity penalty exp(1 - 6/5)
    statistic = corpus.corpus_bleu(["a b c d e"], [{"reference": "a b c d e f"}])
    assert statistic(np.array([0])) == pytest.approx(math.exp(-0.2))


def test_rouge_is_rouge_scores_on_ascii_and_knows_other_letters():
    for kind in ("rouge1", "rouge2", "rougeL"):
        theirs = RougeScorer([kind])
        mine = getattr(overlap, kind)([""] * 4, SAID, ROWS)
        assert mine == [pytest.approx(theirs.score(t, s)[kind].fmeasure) for s, t in zip(SAID, TRUE, strict=True)]
    assert overlap.rouge1([""], ["schöne Grüße"], [{"reference": "Schöne Grüße an alle"}]) == [pytest.approx(2 / 3)]
    # by hand: 4 of 6 and 4 of 6 words in order, "the cat sat on ... mat" is 5 of 6
    assert overlap.rougeL([""], [SAID[0]], [ROWS[0]]) == [pytest.approx(5 / 6)]


def test_answers_by_hand():
    said = ["The Cat!", "big cat", "dog", ""]
    rows = [{"reference": "cat"}, {"reference": "a cat"}, {"reference": ["cat", "dog"]}, {"reference": "the"}]
    assert answers.exact_match([""] * 4, said, rows) == [1.0, 0.0, 1.0, 1.0]
    assert answers.token_f1([""] * 4, said, rows) == [1.0, pytest.approx(2 / 3), 1.0, 1.0]
    assert answers.accuracy([""] * 4, [" cat\n", "Cat", "dog", ""], rows) == [1.0, 0.0, 1.0, 0.0]
    assert answers.edit_similarity([""] * 2, ["kitten", "abc "], [{"reference": "sitting"}, {"reference": "abc"}]) == [
        pytest.approx(1 - 3 / 7),
        1.0,
    ]


def test_macro_f1_by_hand_counts_each_label_once_and_no_label_as_wrong():
    true = ["a", "a", "a", "b"]
    said = ["a", "b", "nonsense", "b"]
    statistic = corpus.macro_f1(said, [{"reference": t} for t in true])
    # a: TP 1, FP 0, FN 2 -> 2/4; b: TP 1, FP 1, FN 0 -> 2/3
    assert statistic(EVERYTHING) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert statistic(np.array([3, 3])) == 1.0


def test_language_is_a_probability_and_an_unknown_code_is_told():
    texts = ["Das Wetter ist heute sehr schön und wir gehen spazieren.", "The weather is very nice today.", "1234"]
    german = language([""] * 3, texts, [{}] * 3, code="de")
    assert german[0] > 0.99 and german[1] < 0.01 and german[2] == 0.0
    with pytest.raises(ValueError, match="language 'xx' is none of"):
        language([""], ["a"], [{}], code="xx")


def test_a_metric_runs_as_a_reward_in_a_worker_and_a_row_without_reference_fails_alone():
    reward = FunctionReward(METRICS["chrf"].source, name="chrf")
    try:
        output = reward(["p"] * 2, ["the cat", "a dog"], [{"reference": "the cat"}, {"row_number": 5}])
    finally:
        reward.close()
    assert output.score_B[0] == 1.0 and "row 5 has no reference" in output.failure_B[1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bleuu", "names 'bleuu', which is no metric: did you mean 'bleu'"),
        ("macro_f1", "only a set of completions has: pay for weighted_accuracy"),
        ("bleu", "compares with a reference: set task.reference"),
        ("likelihood:policy", "has no frozen model: .* paid for its own likelihood learns to be certain"),
        ("likelihood:", "has no frozen model"),
        ("language:german", "write a language's two letters"),
    ],
)
def test_wrong_names_are_told_before_anything_is_loaded(source, message):
    with pytest.raises(ValueError, match=message):
        check_source(source, "rl.reward", reward=True, reference=False)


def test_a_right_answer_is_worth_its_references_weight():
    train = [{"reference": name} for name in ("a", "a", "a", "b")]
    balanced = answers.weights_of(train, "balanced")
    assert balanced == pytest.approx({"a": 4 / (2 * 3), "b": 4 / (2 * 1)})
    said = ["a", "b", "a", "b"]  # recalls 2/3 and 1
    assert np.mean(answers.weighted_accuracy([""] * 4, said, train, weights=balanced)) == pytest.approx((2 / 3 + 1) / 2)
    dear = answers.weights_of(train, {"a": 1.0, "b": 5.0})
    assert dear == pytest.approx({"a": 0.5, "b": 2.5})
    for weights, message in (
        ({"a": 1.0}, "the reference 'b' has rows and no weight"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "the reference 'c' has a weight and no row"),
    ):
        with pytest.raises(DataError, match=message):
            answers.weights_of(train, weights)
