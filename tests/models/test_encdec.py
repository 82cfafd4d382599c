"""The encoder-decoder beside the suite of kinds: the BART shape, its caches, and what leads to it from text."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from upslope.errors import DataError, ModelError
from upslope.models.encdec import EncDec, EncDecConfig
from upslope.models.encdec_runner import EncDecRunner
from upslope.models.stack import StackConfig
from upslope.ragged import Ragged
from upslope.text import prepare
from upslope.text.tokenizer import Tokenizer

T5 = StackConfig(width=16, layers=2, heads=4, head_dim=4, ffn_width=24, context=64, buckets=8, max_distance=12)
BART = StackConfig(
    width=16,
    layers=2,
    heads=4,
    head_dim=4,
    ffn_width=24,
    context=64,
    norm="layer",
    pre_norm=False,
    embed_norm=True,
    bias=True,
    scaled=True,
    gated=False,
    activation="gelu",
    position="learned",
    position_offset=2,
)
CONFIGS = {
    "t5": EncDecConfig(31, T5, replace(T5, across=True)),
    "bart": EncDecConfig(31, BART, replace(BART, across=True), (2, 0), scale_logits=False, scale_embedding=True),
}
SOURCES = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]]


def encdec(name):
    model = EncDec(CONFIGS[name]).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(6).add_(0.1 * noise) if parameter.ndim > 1 else parameter.add_(0.3 * noise)
    return model


def state(model, source, ids):
    """The decoder's state behind ids, each pass by itself."""
    return model.hidden(Ragged.of([source, ids], [-1, 0]))[-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_c14_both_caches_equal_the_uncached_model_as_slots_end_at_different_times(name):
    model = encdec(name)
    runner = EncDecRunner(model, dtype=torch.float32)
    cache = runner.new_cache(4, 24)
    last = runner.prefill(cache, Ragged.of(SOURCES), [[0], [1, 3], [2]])
    for p, source in enumerate(SOURCES):
        torch.testing.assert_close(last[p], state(model, source, []), atol=1e-5, rtol=1e-5)
    rows = [(SOURCES[0], []), (SOURCES[1], []), (SOURCES[2], []), (SOURCES[1], [])]
    for step in range(8):
        if step == 3:  # slot 0 ends, the last one moves there; a new prompt takes the free slot a step later
            cache.move(3, 0)
            rows[0] = rows.pop()
        if step == 4:
            runner.prefill(cache, Ragged.of([[7, 7, 8]]), [[3]])
            rows.append(([7, 7, 8], []))
        ids = [(7 * step + s) % 31 for s in range(len(rows))]
        hidden = runner.step(cache, torch.tensor(ids))
        rows = [(source, [*written, token]) for (source, written), token in zip(rows, ids, strict=True)]
        for slot, (source, written) in enumerate(rows):
            torch.testing.assert_close(hidden[slot], state(model, source, written), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_c13_the_encoder_sees_both_ways_and_the_decoder_the_whole_source(name):
    model = encdec(name)
    before = state(model, [1, 2, 3, 4], [5])
    for changed in ([9, 2, 3, 4], [1, 9, 3, 4], [1, 2, 3, 9]):
        assert (state(model, changed, [5]) - before).abs().max() > 1e-3
    first = model.hidden(Ragged.of([[1, 2, 3, 4], [5, 6]], [-1, 0]))[4]
    torch.testing.assert_close(first, before, atol=1e-6, rtol=1e-5)  # and nothing of what it has not written yet


def test_c13_other_start_tokens_are_other_states():
    model = encdec("bart")
    before = state(model, [1, 2], [])
    for start in ((2,), (2, 1), (1, 0)):
        model.config = replace(CONFIGS["bart"], start_ids=start)
        assert (state(model, [1, 2], []) - before).abs().max() > 1e-3


def test_what_cannot_be_is_one_line():
    model = encdec("t5")
    with pytest.raises(ModelError, match=r"source 1 of the batch is empty; an encoder needs a token to look at"):
        model.hidden(Ragged.of([[1], [], [2]], [-1, -1, 1]))
    with pytest.raises(ModelError, match="a source of 65 tokens exceeds the model's context of 64"):
        model.hidden(Ragged.of([[1] * 65, [2]], [-1, 0]))
    with pytest.raises(ModelError, match="a completion of 63 tokens exceeds the model's context of 62"):
        encdec("bart").hidden(Ragged.of([[1], [2] * 63], [-1, 0]))
    for changes, message in (
        ({"start_ids": (31,)}, "start tokens \\[31\\] are not of a vocabulary of 31"),
        ({"decoder": T5}, "the decoder looks across, the encoder does not"),
        ({"decoder": replace(T5, across=True, width=8)}, "width 16 and a decoder of width 8"),
        ({"encoder": replace(T5, activation="tanh")}, "activation 'tanh' is not known"),
    ):
        with pytest.raises(ModelError, match=message):
            EncDec(replace(CONFIGS["t5"], **changes))


def word_tokenizer(template, *special):
    """Words as tokens, with the specials that a model's tokenizer puts around a text."""
    words = ["<pad>", "</s>", "<s>", "<unk>", "the", "cat", "sat"]
    raw = RawTokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(s, words.index(s)) for s in special]
    )
    bos = {"bos_token": "<s>"} if "<s>" in special else {}
    inner = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", **bos)
    return Tokenizer(inner, "words", for_sources=True)


@pytest.mark.parametrize(
    ("template", "special", "source"),
    [("$A </s>", ["</s>"], [4, 5, 1]), ("<s> $A </s>", ["<s>", "</s>"], [2, 4, 5, 1])],
    ids=["t5", "bart"],
)
def test_c6_a_source_gets_what_its_tokenizer_adds_and_a_target_its_end(template, special, source):
    tokenizer = word_tokenizer(template, *special)
    rows = Dataset.from_list([{"q": "the cat", "a": "sat"}, {"q": " ", "a": "sat"}])
    examples, account = prepare.completion_examples(rows, tokenizer, prompt="q", completion="a", max_tokens=20)
    assert [(e.ids, e.trained) for e in examples] == [([*source, 6, 1], [False] * len(source) + [True, True])]
    assert "1 with an empty source (first: row 1)" in str(account)
    made, account = prepare.prompts(rows, tokenizer, prompt="q", max_tokens=20)
    assert [p.ids for p in made] == [source] and "1 with an empty source (first: row 1)" in str(account)
    pairs = Dataset.from_list([{"q": "the cat", "a": "sat", "b": "the"}])
    (pair,), _ = prepare.pair_examples(pairs, tokenizer, chosen="a", rejected="b", prompt="q", max_tokens=20)
    assert (pair.chosen, pair.rejected, pair.prompt_length) == ([*source, 6, 1], [*source, 4, 1], len(source))


def test_first_words_are_the_source_of_the_rest():
    tokenizer = word_tokenizer("$A </s>", "</s>")
    rows = Dataset.from_list([{"text": "the cat sat"}])
    (example,), _ = prepare.opening_examples(rows, tokenizer, text="text", words=2, max_tokens=20)
    assert example.ids == [4, 5, 1, 6, 1] and example.trained == [False] * 3 + [True] * 2
    (prompt,), _ = prepare.prompts(rows, tokenizer, text="text", words=2, max_tokens=20)
    assert prompt.ids == example.ids[:3]


def test_whole_texts_have_no_source_and_say_what_to_set():
    tokenizer = word_tokenizer("$A </s>", "</s>")
    rows = Dataset.from_list([{"text": "the cat", "b": "sat"}])
    with pytest.raises(DataError, match=r"cannot learn from whole texts.*set data.prompt and data.completion"):
        prepare.text_examples(rows, tokenizer, text="text", max_tokens=20)
    with pytest.raises(DataError, match=r"cannot learn from pairs of whole texts.*set data.prompt"):
        prepare.pair_examples(rows, tokenizer, chosen="text", rejected="b", prompt=None, max_tokens=20)
