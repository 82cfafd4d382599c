import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_decoder
from upslope.errors import ModelError
from upslope.models.hf import load_decoder, save_decoder
from upslope.ragged import Ragged

COMMON = dict(
    vocab_size=43,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.4,
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500.0}  # fmt: skip
THEIRS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama-bias": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama3-rope": lambda: transformers.LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=12),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=43, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4
    ),
}
SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7], [2]]


def theirs_of(name):
    torch.manual_seed(0)
    config = THEIRS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def same_logits(ours, theirs):
    batch = Ragged.of(SEQUENCES)
    with torch.no_grad():
        mine = ours.hidden(batch) @ ours.output_weight.t()
        for sequence, logits in zip(SEQUENCES, mine.split([len(s) for s in SEQUENCES]), strict=True):
            torch.testing.assert_close(logits, theirs(torch.tensor([sequence])).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_import_equals_the_transformers_class(name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    same_logits(load_decoder(tmp_path), theirs)


@pytest.mark.parametrize("name", THEIRS)
def test_export_is_loaded_by_transformers_with_equal_logits(name, tmp_path):
    theirs_of(name).save_pretrained(tmp_path / "in")
    ours = load_decoder(tmp_path / "in")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_decoder(ours, tmp_path / "out")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_logits(ours, loaded.eval())
    same_logits(load_decoder(tmp_path / "out"), loaded)


def test_shards_are_read_as_one(tmp_path):
    theirs = theirs_of("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same_logits(load_decoder(tmp_path), theirs)


@pytest.fixture
def saved(tmp_path):
    save_decoder(tiny_decoder(tied=False), tmp_path)
    return tmp_path


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_missing_weight_is_named(saved):
    change(saved, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(saved)


def test_an_extra_weight_is_named(saved):
    change(saved, lambda w: w.update(surprise=torch.zeros(1)))
    with pytest.raises(ModelError, match="1 extra: surprise"):
        load_decoder(saved)


def test_another_shape_is_shown_with_both(saved):
    change(saved, lambda w: w.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is 3, expected 16"):
        load_decoder(saved)


@pytest.mark.parametrize("keep", [0, 7, 100, -10])
def test_truncated_safetensors_is_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="damaged or cut short"):
        load_decoder(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt_neox", "architecture 'gpt_neox' is not known; known: llama"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2}, "rope scaling 'yarn'"),
        ("hidden_act", "relu", "activation 'relu'"),
    ],
)
def test_configurations_that_would_compute_other_numbers(saved, key, value, message):
    raw = json.loads((saved / "config.json").read_text())
    raw |= {key: value, "rope_parameters": None}
    (saved / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=message):
        load_decoder(saved)


def test_folders_without_a_model(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_decoder(tmp_path / "empty")
    shutil.move(saved / "model.safetensors", saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no pickled weights"):
        load_decoder(saved)


def test_a_shape_without_a_class_of_theirs_is_not_exported(tmp_path):
    with pytest.raises(ModelError, match="no Hugging Face class"):
        save_decoder(tiny_decoder(norm="layer"), tmp_path)
