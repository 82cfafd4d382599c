import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from upslope.errors import ModelError
from upslope.models.encdec_hf import load_encdec, save_encdec
from upslope.ragged import Ragged

T5 = dict(
    vocab_size=43,
    d_model=16,
    d_kv=6,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    initializer_factor=0.8,
    decoder_start_token_id=0,
)
BART = dict(
    vocab_size=43,
    d_model=16,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=20,
    max_position_embeddings=40,
    init_std=0.4,
)
THEIRS = {
    "t5-1.0": lambda: transformers.T5Config(**T5, feed_forward_proj="relu"),
    "t5-1.1": lambda: transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: transformers.BartConfig(**BART),
    "bart-scaled": lambda: transformers.BartConfig(**BART, scale_embedding=True, activation_function="relu"),
}
SOURCES = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [8, 9, 7], [2]]  # the first beyond every relative distance
TARGETS = [(0, [5, 6, 7]), (0, [9]), (1, [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]), (2, [30, 31])]


def theirs_of(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(THEIRS[name]()).eval()
    if name == "t5-1.1":  # transformers 5 ties what its configuration unties
        model.lm_head.weight = torch.nn.Parameter(torch.randn(43, 16))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "relative" in key or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.4)
    return model


def save_theirs(model, folder):
    model.save_pretrained(folder)
    return folder


def same_logits(ours, theirs):
    """c13: sources of several lengths and several completions of one, against each alone with its own start."""
    batch = Ragged.of([*SOURCES, *(ids for _, ids in TARGETS)], [-1] * len(SOURCES) + [s for s, _ in TARGETS])
    start = list(ours.config.start_ids)
    with torch.no_grad():
        mine = ours.hidden(batch) @ ours.output_weight.t()
        for row, (source, ids) in enumerate(TARGETS, len(SOURCES)):
            expected = theirs(
                input_ids=torch.tensor([SOURCES[source]]), decoder_input_ids=torch.tensor([[*start, *ids]])
            ).logits[0, len(start) - 1 :]
            first = mine[batch.starts[source + 1] - 1 : batch.starts[source + 1]]
            found = torch.cat((first, mine[batch.starts[row] : batch.starts[row + 1]]))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_c13_import_equals_the_transformers_class(name, tmp_path):
    theirs = theirs_of(name)
    ours = load_encdec(save_theirs(theirs, tmp_path))
    same_logits(ours, theirs)
    assert ours.config.tied == (name != "t5-1.1")


@pytest.mark.parametrize("name", THEIRS)
def test_export_is_loaded_by_transformers_with_equal_logits(name, tmp_path):
    ours = load_encdec(save_theirs(theirs_of(name), tmp_path / "in"))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_encdec(ours, tmp_path / "out")
    loaded, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_logits(ours, loaded.eval())
    again = load_encdec(tmp_path / "out")
    assert again.config == ours.config
    same_logits(again, loaded)


@pytest.fixture
def saved(tmp_path):
    save_encdec(load_encdec(save_theirs(theirs_of("bart"), tmp_path / "in")), tmp_path / "out")
    return tmp_path / "out"


def test_a_forced_first_token_is_a_start_token_from_either_file(saved):
    assert load_encdec(saved).config.start_ids == (2,)
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((saved / name).read_text())
        (saved / name).write_text(json.dumps(raw | {"forced_bos_token_id": 0}))
        assert load_encdec(saved).config.start_ids == (2, 0)
        (saved / name).write_text(json.dumps(raw))
    model = load_encdec(saved)
    model.config = replace(model.config, start_ids=(2, 0))
    save_encdec(model, saved)
    assert load_encdec(saved).config.start_ids == (2, 0)


def test_a_bart_without_its_head_is_read_by_its_bare_names(saved):
    weights = load_file(saved / "model.safetensors")
    save_file({name.removeprefix("model."): w for name, w in weights.items()}, saved / "model.safetensors")
    same = load_encdec(saved).state_dict()
    assert torch.equal(same["embed.weight"], weights["model.shared.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "swoosh"}, "activation 'swoosh' is not known"),
        ({"normalize_before": True}, "normalize_before is True"),
        ({"decoder_start_token_id": 99}, r"start tokens \[99\] are not of a vocabulary of 43"),
        ({"encoder_layers": 0}, "layers is 0, not a whole number"),
        ({"encoder_layers": 3}, r"missing: model\.encoder\.layers\.2"),
        ({"d_model": None}, "the key d_model is missing"),
    ],
)
def test_configurations_that_cannot_be_are_one_line(saved, changes, message):
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ModelError, match=message) as caught:
        load_encdec(saved)
    assert "\n" not in str(caught.value)


def test_a_bias_of_the_logits_that_is_not_0_is_refused(saved):
    weights = load_file(saved / "model.safetensors")
    save_file(weights | {"final_logits_bias": torch.zeros(1, 43)}, saved / "model.safetensors")
    load_encdec(saved)
    save_file(weights | {"final_logits_bias": torch.ones(1, 43)}, saved / "model.safetensors")
    with pytest.raises(ModelError, match="final_logits_bias is not 0 everywhere"):
        load_encdec(saved)
