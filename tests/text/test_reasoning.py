"""Rows of reasoning-gym by a stand-in of the same shape, and by the library itself where it is installed."""

import json
from types import SimpleNamespace

import pytest

from upslope.errors import DataError
from upslope.rewards import verifier as verifier_module
from upslope.rewards.verifier import verifier
from upslope.text import reasoning


def make_library():
    def create_dataset(name, size, seed, **options):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        most = options.get("most", 9)
        told = options.get("told", True)  # some generators only judge
        return [
            {"question": f"{n} + {seed}?", "answer": n + seed if told else None, "metadata": {"most": most}}
            for n in range(size)
        ]

    def get_score_answer_fn(name):
        return lambda answer, entry: float(int(answer) == int(entry["answer"]))

    return SimpleNamespace(create_dataset=create_dataset, get_score_answer_fn=get_score_answer_fn)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(reasoning, "library", make_library)
    monkeypatch.setattr(verifier_module, "library", make_library)
    verifier_module._judge.cache_clear()


def test_a_source_names_the_generator_its_size_its_seed_and_its_settings(stand_in):
    rows = reasoning.puzzles("sums?size=3&seed=2&most=50")
    assert [r["question"] for r in rows] == ["0 + 2?", "1 + 2?", "2 + 2?"] and rows[1]["answer"] == "3"
    assert json.loads(rows[0]["entry"])["metadata"] == {"most": 50} and rows[0]["dataset"] == "sums"
    assert len(reasoning.puzzles("sums")) == reasoning.SIZE
    assert [r["answer"] for r in reasoning.puzzles("sums?size=2&told=false")] == [None, None]
    with pytest.raises(DataError, match="reasoning-gym makes no 'summs': Dataset 'summs' not registered"):
        reasoning.puzzles("summs")


def test_the_verifier_scores_by_the_generators_rule(stand_in):
    rows = reasoning.puzzles("sums?size=2&seed=2")
    assert verifier(["", ""], [" 2\n", "7"], rows) == [1.0, 0.0]
    assert verifier(["", ""], ["two", "3"], rows) == [0.0, 1.0]  # the rule cannot read the first


def test_without_the_library_the_extra_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(reasoning.importlib, "import_module", missing)
    with pytest.raises(DataError, match=r"needs reasoning-gym, which is not here; pip install 'upslope\[reasoning\]'"):
        reasoning.puzzles("sums")


def test_the_library_itself_makes_and_judges_sums():
    pytest.importorskip("reasoning_gym")
    rows = reasoning.puzzles("basic_arithmetic?size=4&seed=3")
    assert verifier([""] * 4, [r["answer"] for r in rows], rows) == [1.0] * 4
    assert verifier([""], ["no number"], rows[:1])[0] < 0.5
