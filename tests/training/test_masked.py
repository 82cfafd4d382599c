"""Masked-language modelling: what is hidden, the loss beside transformers', and runs of the stage."""

import json

import pytest
import torch
import transformers
from datasets import Dataset

import upslope
from tests.training.test_classify import SHAPE, labelled_rows, recipe
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.errors import DataError, Interrupted
from upslope.models.encoder_hf import load_encoder
from upslope.text.examples import Example
from upslope.text.tokenizer import Tokenizer
from upslope.training.masked import Masked, hide, masked_logprobs, masked_texts

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


def test_the_loss_is_that_of_transformers(tmp_path):
    config = transformers.BertConfig(
        vocab_size=43, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=40, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(config).eval()
    theirs.save_pretrained(tmp_path)
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
