"""Choosing a passage: the scores of an encoder, the rows that cannot be, and whole runs by likelihood and by reward."""

import json

import numpy as np
import pytest
import torch

import upslope
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.config import Scratch
from upslope.errors import DataError, Interrupted, ModelError, RecipeError
from upslope.models.open import load_model, make_runner, new_model, save_model
from upslope.models.passages import split_sources
from upslope.observe.events import read_events
from upslope.ragged import Ragged
from upslope.text.baselines import overlap, random
from upslope.training.ranking import logits_of, of_choices, reciprocal_ranks

SHAPE = {"kind": "encoder", "width": 32, "layers": 1, "heads": 2, "context": 48, "vocab": 300}
NOUNS = ["cat", "dog", "sun", "moon", "tree", "star", "fish", "bird"]


def rows_of(count=160):
    made = []
    for n in range(count):
        others = [NOUNS[(n + k) % 8] for k in (1, 2, 3)][: 1 + n % 3]
        passages = [f"about a {noun}" for noun in others]
        passages.insert(n % (len(others) + 1), f"about a {NOUNS[n % 8]}")
        made.append({"asked": f"the {NOUNS[n % 8]} {n}", "found": passages, "right": n % (len(others) + 1)})
    return made


def recipe(**changes):
    base = {
        "model": SHAPE,
        "dtype": "fp32",
        "checkpoint_minutes": 0,
        "data": {"rows": "given", "passages": "found", "valid": 0.2, "test": 0.2, "max_tokens": 60},
        "task": {"prompt": "{asked}", "reference": "right", "metrics": ["accuracy"], "baseline": "overlap"},
        "optim": {"lr": 1e-2, "micro_tokens": 512},
        "sft": {"steps": 25, "batch": 16},
        "rl": {"reward": "accuracy", "steps": 2, "prompts": 8, "max_tokens": 1},
        "eval": {"prompts": 16, "judges": [], "watched": 4},
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def train(out, rows=None, **changes):
    return upslope.train(recipe(**changes), rows=rows or rows_of(), out=out, plain=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("retrieval") / "run")


def chooser(most=3):
    model = new_model(Scratch(**SHAPE), 60, 0)
    model.take_labels(tuple(str(n) for n in range(most)), 9)
    return model


SOURCES = [[1, 5, 6, 9, 7, 9, 5, 8, 9], [1, 5, 9, 7, 9, 5, 9, 6, 6, 9]]  # of two and of three passages


def test_a_logit_is_the_cosine_of_text_and_passage_and_an_absent_one_is_never_chosen():
    model = chooser()
    parts = [[1, 5, 6, 9], [1, 7, 9], [1, 5, 8, 9]]
    pooled = torch.cat([model._pooled(Ragged.of([part])) for part in parts])[:, :-1]
    unit = torch.nn.functional.normalize(pooled, dim=-1)
    logits = torch.tensor(logits_of(model, SOURCES, 99), dtype=torch.float32)
    torch.testing.assert_close(logits[0, :2], 20 * (unit[1:] @ unit[0]), atol=1e-4, rtol=1e-4)
    assert logits[0, 2] < -9e3 and torch.softmax(logits[0], 0)[2] == 0 and (logits[1] > -30).all()


def test_the_runner_chooses_by_the_same_logits_and_a_saved_chooser_is_the_same(tmp_path):
    model = chooser()
    with torch.no_grad():
        model.sharpness.fill_(2.0)
    plain = logits_of(model, SOURCES, 99)
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        runner = make_runner(model, dtype=dtype)
        assert runner.checksum() == runner.checksum_of(model)
        found = runner.prefill(runner.new_cache(2, 9), Ragged.of(SOURCES), [[0], [1]])
        expected = torch.tensor(logits_of(model, SOURCES, 99), dtype=torch.float32)
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.0}
        torch.testing.assert_close(found @ runner.output_weight.t(), expected, **close)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config and again.labels == ("0", "1", "2")
    assert np.allclose(logits_of(again, SOURCES, 99), plain)


def test_sources_that_cannot_be_are_named():
    for ids, message in (
        ([1, 5, 9], "source 0 of the batch has 0 passages, not 1 to 3"),
        ([1, 5, 9, 6, 9, 6, 9, 6, 9, 6, 9], "source 0 of the batch has 4 passages, not 1 to 3"),
        ([1, 5, 9, 6], "has 0 passages, not 1 to 3"),
        ([1, 5, 9, 9], "the passage 0 of source 0 of the batch is empty"),
        ([1, 9, 5, 9], "the text of source 0 of the batch is empty"),
    ):
        with pytest.raises(ModelError, match=message):
            split_sources(Ragged.of([ids]), 9, 3)


def test_ranks_by_hand():
    logits = np.array([[3.0, 2.0, 1.0], [0.0, 5.0, 5.0], [1.0, 4.0, 2.0]])
    assert reciprocal_ranks(logits, [0, 1, 0]).tolist() == pytest.approx([1, 1 / 1.5, 1 / 3])
    assert of_choices([1, 0], [1, 2], [3, 3]).tolist() == pytest.approx([1, (1 / 2 + 1 / 3) / 2])


def test_baselines_choose_by_shared_words_and_by_a_draw():
    rows = [{"q": "a red fox", "p": ["the sea", "the red fox"]}, {"q": "up", "p": ["one", "two"]}]
    assert overlap([], rows, "q", "r", "p") == ["1", "0"]
    many = [{"p": [f"a{n}", f"b{n}"]} for n in range(200)]
    drawn = random([], many, None, "r", "p")
    assert drawn == random([], many, None, "r", "p") and 70 < drawn.count("1") < 130


def test_passages_are_learned_and_ranked_on_unseen_rows(finished):
    sft = json.loads((finished / "sft" / "done.json").read_text())["metrics"]
    assert sft["valid/accuracy"] > 0.8 > sft["valid/accuracy_before"]
    assert sft["valid/accuracy"] <= sft["valid/mrr"] <= 1 and "valid/macro_f1" not in sft
    events = read_events(finished / "events.jsonl")
    table = next(e for e in events if e["kind"] == "table" and e["stage"] == "eval")
    shown = {row[0]: row[1:] for row in table["rows"]}
    assert table["columns"] == ["", "baseline", "before", "after", "change"] and "task: mrr" in shown
    assert "distinct-1" not in shown and "perplexity, original model" not in shown  # of numbers they say nothing
    assert shown["task: accuracy"][0].startswith("1.000")  # the words of these rows tell
    for line in (finished / "episodes.jsonl").read_text().splitlines():
        episode = json.loads(line)
        assert len(episode["actions"]) == 1 and episode["completion"] in "0123" and episode["finish"] == "eos"


def test_a_trained_model_chooses_and_says_what_it_cannot(finished, tmp_path):
    model = upslope.load(finished, dtype="fp32")
    asked = {"cat": "sun", "fish": "dog"}
    assert [model.choose(f"the {a} 7", [f"about a {b}", f"about a {a}"]) for a, b in asked.items()] == [1, 1]
    with pytest.raises(ModelError, match=r"chooses among passages and writes no text; use choose"):
        model.generate(["the cat"])
    for passages, message in (
        (["one"], "nothing to choose: with fewer than two passages; give 2 to 4 texts"),
        (["a", " "], "nothing to choose: with an empty passage"),
        (["a"] * 5, "nothing to choose: 5 passages; give 2 to 4 texts"),
    ):
        with pytest.raises(DataError, match=message):
            model.choose("the cat", passages)


def test_a_reward_alone_teaches_passages(tmp_path):
    rl = {"reward": "accuracy", "algorithm": "rloo", "steps": 30, "prompts": 16, "samples": 4, "max_tokens": 1, "kl": 0}
    run = train(tmp_path / "run", sft=None, rl=rl)
    metrics = [e.get("metrics", {}) for e in read_events(run / "events.jsonl")]
    means = [m["reward/mean"] for m in metrics if "reward/mean" in m]
    assert np.mean(means[-5:]) > np.mean(means[:2]) + 0.2


def test_a_run_that_chooses_passages_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    changes = {"sft": {"steps": 2, "batch": 4}}
    whole = train(tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        stop_at_ask(patch, 9)
        with pytest.raises(Interrupted):
            train(tmp_path / "broken", **changes)
    train(tmp_path / "broken", **changes)
    same(outcome(whole), outcome(tmp_path / "broken"))


def test_rows_that_cannot_be_are_dropped_and_counted_by_their_numbers(tmp_path):
    rows = rows_of()
    for number, changes in {
        3: {"found": ["only one"]},
        5: {"right": 7},
        8: {"found": ["about a sun", "  "]},
        13: {"right": None},
        21: {"found": ["about a cat", "word " * 100]},
    }.items():
        rows[number] = rows[number] | changes
    run = train(
        tmp_path / "run",
        rows=rows,
        sft={"steps": 1},
        rl=None,
        data=recipe()["data"] | {"valid": 0.01, "max_tokens": 300},
    )
    told = " ".join(e["text"] for e in read_events(run / "events.jsonl") if e["kind"] == "account")
    for reason in (
        "with fewer than two passages (first: row 3)",
        "whose right is no number of a passage, from 0 (first: row 5)",
        "with an empty passage (first: row 8)",
        "without right (first: row 13)",
        "with a text or passage of more than the 46 tokens that the encoder has room for (first: row 21)",
    ):
        assert reason in told


def test_rows_that_differ_in_their_passages_are_no_repeats(tmp_path):
    rows = [{"asked": f"which {n // 2}", "found": [f"about {n}", "about a cat"], "right": 0} for n in range(60)]
    run = train(tmp_path / "run", rows=rows, sft={"steps": 1}, rl=None)
    told = " ".join(e["text"] for e in read_events(run / "events.jsonl") if e["kind"] == "account")
    assert "rows: 60 rows of 60; nothing dropped" in told


def test_what_cannot_be_is_one_line(model_dir, tmp_path):
    with pytest.raises(DataError, match="no row has two passages in column 'found': nothing to choose"):
        train(tmp_path / "a", rows=[row | {"found": row["found"][:1]} for row in rows_of()])
    with pytest.raises(ModelError, match=r"data\.passages is set, and the model is no encoder"):
        train(tmp_path / "b", model=str(model_dir), rl=None)
    with pytest.raises(RecipeError, match=r"rl\.max_tokens = 4, but the number of a passage is one; set it to 1"):
        train(tmp_path / "c", rl=recipe()["rl"] | {"max_tokens": 4})
    with pytest.raises(RecipeError, match="passages and classes are both what an encoder chooses from"):
        train(tmp_path / "d", data=recipe()["data"] | {"classes": "right"})
    with pytest.raises(RecipeError, match=r"task\.baseline = overlap chooses a passage; set data\.passages"):
        train(tmp_path / "e", data={"rows": "given"})
    task = {key: value for key, value in recipe()["task"].items() if key == "prompt"}
    with pytest.raises(RecipeError, match=r"\[sft\] has no passage to learn; set data\.completion or task\.reference"):
        train(tmp_path / "f", task=task, rl=None)
