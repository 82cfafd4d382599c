"""Masked-language modelling: what is hidden, the loss beside transformers', and runs of the stage."""

import json

import pytest
import torch
import transformers
from datasets import Dataset

import upslope
from tests.training.test_classify import SHAPE, labelled_rows, recipe
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.errors import DataError, Interrupted, RecipeError
from upslope.models.encoder_hf import load_encoder, save_encoder
from upslope.text.examples import Example
from upslope.text.tokenizer import Tokenizer, train_tokenizer
from upslope.training.masked import (
    Masked,
    halved,
    hide,
    masked_logprobs,
    masked_loss,
    masked_texts,
    next_metrics,
    text_pairs,
)

MASK = 3


def test_15_percent_are_chosen_of_which_80_10_10_are_hidden():
    texts = [Example([5 + (i + n) % 90 for n in range(200)], [False] + [True] * 199, i) for i in range(100)]
    hidden = hide(texts, MASK, 10_000, 7, 3)
    places = [
        (a, b, c)
        for text, m in zip(texts, hidden, strict=True)
        for a, b, c in zip(text.ids, m.ids, m.trained, strict=True)
    ]
    assert all(a == b for a, b, chosen in places if not chosen)
    changed = [(a, b) for a, b, chosen in places if chosen]
    assert len(changed) / (199 * 100) == pytest.approx(0.15, abs=0.01)
    assert sum(b == MASK for _, b in changed) / len(changed) == pytest.approx(0.8, abs=0.03)
    assert sum(a == b for a, b in changed) / len(changed) == pytest.approx(0.1, abs=0.02)
    assert not any(m.trained[0] for m in hidden)  # never a special one
    assert [t for m in hidden for t in m.hidden] == [a for a, _ in changed]


def test_what_is_hidden_depends_on_seed_step_and_row_alone():
    texts = [Example(list(range(5, 45)), [True] * 40, row) for row in range(3)]
    whole = hide(texts, MASK, 50, 7, 3)
    assert hide(texts[1:2], MASK, 50, 7, 3) == whole[1:2]
    assert len({tuple(m.trained) for m in whole}) == 3
    assert hide(texts, MASK, 50, 8, 3) != whole != hide(texts, MASK, 50, 7, 4)
    (short,) = hide([Example([1, 9], [False, True], 0)], MASK, 50, 7, 3)
    assert short.trained == [False, True]  # one at the least


def saved_bert(kind, folder):
    """A random small BERT of a class of transformers, written to a folder."""
    config = transformers.BertConfig(
        vocab_size=43, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=40, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = kind(config).eval()
    theirs.save_pretrained(folder)
    return theirs


def test_the_loss_is_that_of_transformers(tmp_path):
    theirs = saved_bert(transformers.BertForMaskedLM, tmp_path)
    texts = [
        Masked([2, 3, 9, 3, 1], [False, True, False, True, False], 0, [7, 8]),
        Masked([2, 9, 3], [False, True, True], 1, [11, 12]),
    ]
    logp = masked_logprobs(load_encoder(tmp_path), texts)
    for text, found in zip(texts, logp.split([2, 2]), strict=True):
        labels = torch.full((1, len(text.ids)), -100)
        labels[0, torch.tensor(text.trained)] = torch.tensor(text.hidden)
        expected = theirs(torch.tensor([text.ids]), labels=labels).loss
        torch.testing.assert_close(-found.mean(), expected, atol=1e-5, rtol=1e-5)


def test_a_run_pretrains_then_classifies_and_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    tables = recipe(pretrain={"steps": 4, "batch": 8}, sft={"steps": 2, "batch": 8}, rl=None)

    def train(out):
        return upslope.train(tables, rows=labelled_rows(), out=out, plain=True)

    whole = train(tmp_path / "whole")
    closing = json.loads((whole / "pretrain" / "done.json").read_text())["metrics"]
    assert closing["valid/loss"] < closing["valid/loss_before"] and "valid/accuracy" not in closing
    stopped = 0
    for at in (3, 5):
        with monkeypatch.context() as patch:
            stop_at_ask(patch, at)
            try:
                train(tmp_path / "broken")
            except Interrupted:
                stopped += 1
    train(tmp_path / "broken")
    assert stopped
    same(outcome(whole), outcome(tmp_path / "broken"))
    config = json.loads((whole / "pretrain" / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert Tokenizer.load(whole / "start" / "model", for_sources=True).inner.mask_token_id < SHAPE["vocab"]


def test_a_tokenizer_without_a_mask_is_refused(tokenizer):
    with pytest.raises(DataError, match="has no mask token; use an encoder's own tokenizer"):
        masked_texts(Dataset.from_list([{"text": "a"}]), tokenizer, text="text", max_tokens=9)


def pair(n):
    ids = [1, *range(10 * n, 10 * n + 4), 9, *range(10 * n + 4, 10 * n + 7), 9]
    return Example(ids, [token not in (1, 9) for token in ids], n)


PAIRS = [pair(n) for n in range(1, 200)]


def test_a_second_half_is_its_own_or_the_next_texts_half_the_time():
    hidden = hide(PAIRS, MASK, 10_000, 7, 3, separator=9)
    assert sum(m.follows for m in hidden) / len(hidden) == pytest.approx(0.5, abs=0.1)
    for n, m in enumerate(hidden):
        whole = [*m.ids]
        for place, token in zip([p for p, c in enumerate(m.trained) if c], m.hidden, strict=True):
            whole[place] = token
        other = PAIRS[n if m.follows else (n + 1) % len(PAIRS)].ids
        assert whole == PAIRS[n].ids[:6] + other[6:] and m.first == 6 and m.types == [0] * 6 + [1] * 4
    assert hide(PAIRS[:1], MASK, 50, 7, 3, separator=9)[0].follows is True  # there is no other
    assert [m.follows for m in hide(PAIRS, MASK, 50, 7, 4, separator=9)] != [m.follows for m in hidden]


def test_a_text_is_cut_at_the_end_of_the_sentence_nearest_its_middle():
    assert halved("One. Two is longer! Three?") == ("One. Two is longer!", "Three?")
    assert halved('He said "go." She went on.') == ('He said "go."', "She went on.")
    assert halved("Only one sentence.") is None and halved("v1.2 of it") is None


def test_the_loss_of_pairs_is_that_of_transformers(tmp_path):
    theirs = saved_bert(transformers.BertForPreTraining, tmp_path)
    ours = load_encoder(tmp_path)
    assert ours.config.paired
    texts = [
        Masked([2, 3, 9, 3, 9], [False, True, False, True, False], 0, [7, 8], 3, True),
        Masked([2, 4, 9, 3, 3, 9], [False, False, False, True, True, False], 1, [11, 12], 3, False),
    ]
    expected, right = [], []
    for text in texts:
        labels = torch.full((1, len(text.ids)), -100)
        labels[0, torch.tensor(text.trained)] = torch.tensor(text.hidden)
        out = theirs(
            torch.tensor([text.ids]), token_type_ids=torch.tensor([text.types]), labels=labels,
            next_sentence_label=torch.tensor([int(not text.follows)]),
        )  # fmt: skip
        expected.append(out.loss)
        right.append(float(out.seq_relationship_logits[0].argmax() == int(not text.follows)))
    found = masked_loss(ours, texts, 4, 2)  # as many tokens in each: the mean of all is the mean of the means
    torch.testing.assert_close(found, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)
    assert next_metrics(ours, texts, [[0], [1]])["valid/next_accuracy"] == sum(right) / 2
    save_encoder(ours, tmp_path / "out")
    loaded, report = transformers.BertForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.cls.seq_relationship.weight, theirs.cls.seq_relationship.weight)


def prose(count=120):
    return [
        {"text": f"Here is number {n} of them. And number {n} goes on.", "label": "ab"[n % 2]} for n in range(count)
    ]


def paired_recipe(**changes):
    data = recipe()["data"] | {"next": True, "max_tokens": 64}
    shape = SHAPE | {"context": 64}
    return recipe(model=shape, data=data, pretrain={"steps": 4, "batch": 8}, rl=None, **({"sft": None} | changes))


def test_pairs_are_pretrained_in_a_run_that_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    def train(out):
        return upslope.train(paired_recipe(sft={"steps": 2}), rows=prose(), out=out, plain=True)

    whole = train(tmp_path / "whole")
    closing = json.loads((whole / "pretrain" / "done.json").read_text())["metrics"]
    assert closing["valid/next_accuracy_before"] == 0.5 and closing["valid/next_loss"] < 1
    assert closing["valid/loss"] < closing["valid/loss_before"]
    with monkeypatch.context() as patch:
        stop_at_ask(patch, 4)
        with pytest.raises(Interrupted):
            train(tmp_path / "broken")
    train(tmp_path / "broken")
    same(outcome(whole), outcome(tmp_path / "broken"))
    config = json.loads((whole / "pretrain" / "model" / "config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"]


def test_texts_that_are_no_pair_are_dropped_and_counted():
    rows = Dataset.from_list([
        {"text": "One here. Two there."}, {"text": "Only one."}, {"text": ""}, {"text": "Long " * 40 + ". And short."},
    ])  # fmt: skip
    made, account = text_pairs(rows, small_tokenizer(), text="text", max_tokens=60)
    assert len(made) == 1 and made[0].ids.count(1) == 2 and not made[0].trained[0]
    assert account.dropped == {
        "of one sentence, which none follows": 1, "without text": 1, "with a half longer than 30 tokens": 1,
    }  # fmt: skip


def small_tokenizer():
    return train_tokenizer(["One here. Two there. Only"], 280, mask=True)


def test_pairs_without_their_stage_are_one_line(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.next belongs to the stage pretrain of an encoder"):
        upslope.train(paired_recipe() | {"pretrain": None, "sft": {"steps": 1}}, rows=prose(), out=tmp_path, plain=True)
