"""Frozen models as rewards: by a plain forward pass, by vectors made by hand, and in a run as one of several."""

import math

import pytest
import torch

import upslope
from tests.conftest import tiny_decoder
from upslope.config import source_name
from upslope.errors import ModelError, RecipeError
from upslope.observe.events import read_events
from upslope.ragged import Ragged
from upslope.training import judges
from upslope.training.episode import Episode
from upslope.training.judges import LikelihoodSource, SimilaritySource
from upslope.training.update import StopAsked, never


def episode(prompt, completion, finish="eos"):
    return Episode(prompt, completion, [1], [0], [0.0], finish, 0, 0, 0)


def by_hand(model, tokenizer, prompt, completion, end):
    """Mean log-probability of the completion, token by token, each by its own forward pass."""
    ids = tokenizer.encode(prompt)
    total, new = 0.0, [*tokenizer.encode(completion, special=False), *([tokenizer.eos_id] if end else [])]
    for token in new:
        hidden = model.hidden(Ragged.of([ids]))[-1]
        total += float(torch.log_softmax((hidden @ model.output_weight.T).double(), -1)[token])
        ids = [*ids, token]
    return total / len(new)


def test_likelihood_is_the_mean_log_probability_of_the_completion_and_its_end(tokenizer):
    model = tiny_decoder(1, vocab_size=tokenizer.vocab_size)
    source = LikelihoodSource("likelihood", model, tokenizer, 64, never)
    told = [("a fine", " film, full"), ("a", " dull film"), ("the best", " of them all"), ("the", "")]
    ends = ["eos", "length", "stop", "eos"]
    output = source([episode(p, c, f) for (p, c), f in zip(told, ends, strict=True)], [{}] * 4)
    with torch.no_grad():
        expected = [by_hand(model, tokenizer, p, c, f != "length") for (p, c), f in zip(told, ends, strict=True)]
    assert output.score_B == pytest.approx(expected, abs=1e-5) and output.failure_B == [None] * 4


def test_likelihood_of_nothing_or_of_too_much_is_a_failure_and_a_stop_is_heard(tokenizer):
    model = tiny_decoder(1, vocab_size=tokenizer.vocab_size, context=16)
    source = LikelihoodSource("likelihood", model, tokenizer, 64, never)
    output = source([episode("a", "", "length"), episode("a", "x" * 40), episode("a", " film")], [{}] * 3)
    assert output.failure_B[0] == "the completion has no token to judge"
    assert output.failure_B[1] == "42 tokens exceed the context of 16"
    assert math.isnan(output.score_B[0]) and math.isnan(output.score_B[1]) and output.score_B[2] < 0
    source.should_stop = lambda: True
    with pytest.raises(StopAsked):
        source([episode("a", " film")], [{}])


def test_similarity_is_the_cosine_to_the_nearest_reference():
    vectors = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.0, 1.0]}
    source = SimilaritySource("similarity", lambda texts: torch.tensor([vectors[t] for t in texts]))
    rows = [{"reference": "a"}, {"reference": ["a", "c"]}, {"reference": "c"}]
    output = source([episode("", c) for c in ("a", "b", "a")], rows)
    assert output.score_B == pytest.approx([1.0, 0.8, 0.0])


def test_without_an_encoder_the_package_is_named(monkeypatch):
    monkeypatch.setattr(judges, "encoder_folder", lambda: None)
    with pytest.raises(ModelError, match="needs a sentence encoder and none is here; install it with pip install"):
        SimilaritySource("similarity")


def test_each_kind_of_name_has_a_short_one():
    names = ["bleu", "stage:reward", "likelihood:pypi:a==1/b.gguf", "language:de", "my.py:score", "m:f"]
    assert [source_name(n) for n in names] == ["bleu", "learned", "likelihood", "language_de", "score", "f"]


def test_any_weighted_mixture_of_named_learned_and_own_rewards_is_the_total(recipe, rows, tmp_path, model_dir):
    """A metric by name, a learned model, a frozen one, a language and a function of one's own, each with its weight."""
    weights = {
        "chrf": 1.0,
        "stage:reward": 0.5,
        f"likelihood:{model_dir}": 0.25,
        "language:en": 0.1,
        "tests.scores:shouts": 2.0,
        "length_words": -0.01,
    }
    recipe["rl"]["reward"] = weights
    recipe["task"] = {"reference": "label"}
    del recipe["sft"]
    folder = upslope.train(recipe, "rl.steps=1", rows=rows, out=tmp_path / "run", plain=True)
    episodes = read_events(folder / "episodes.jsonl")
    names = dict(zip((source_name(n) for n in weights), weights.values(), strict=True))
    for e in episodes:
        assert e["rewards"].keys() == names.keys()
        assert e["total"] == pytest.approx(sum(names[n] * score for n, score in e["rewards"].items()))
        assert e["rewards"]["likelihood"] < 0 <= e["rewards"]["chrf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl.reward": "chrf"}, "rl.reward is chrf, which compares with a reference; set task.reference"),
        ({"rl.reward": "likelihood:policy"}, "has no frozen model"),
        ({"eval.judges": ["vadar"]}, "eval.judges names 'vadar', which is no metric; did you mean 'vader'"),
        ({"task.metrics": ["bleu"]}, "task.metrics is bleu, which compares with a reference"),
    ],
)
def test_a_score_that_cannot_be_is_told_when_the_recipe_is_read(recipe, changes, message):
    for key, value in changes.items():
        table, _, name = key.partition(".")
        recipe.setdefault(table, {})[name] = value
    with pytest.raises(RecipeError, match=message):
        upslope.train(recipe, rows=[], plain=True)
