import gguf
import numpy as np
import pytest
import torch
import transformers

from tests.models.test_hf import same_logits
from upslope.errors import ModelError
from upslope.models.hf import load_decoder
from upslope.models.names import GGUF, LLAMA

HEADS, KV_HEADS = 4, 2


def to_pairs(weight, heads):
    """Rows in the order that llama.cpp keeps q and k in: the inverse of what the reader does."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path, model, *, quantised=None, drop=None):
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    state = model.state_dict()
    ours, theirs = GGUF.expand(c.num_hidden_layers), LLAMA.expand(c.num_hidden_layers)
    for name, gguf_name in ours.items():
        if theirs[name] not in state or name == "head.weight" or gguf_name == drop:
            continue
        array = state[theirs[name]].float().numpy()
        if gguf_name.endswith(("attn_q.weight", "attn_k.weight")):
            array = to_pairs(array, HEADS if "attn_q" in gguf_name else KV_HEADS)
        array = np.ascontiguousarray(array)
        if gguf_name == quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=43, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_gguf_equals_the_transformers_class(theirs, tmp_path):
    write(tmp_path / "m.gguf", theirs)
    same_logits(load_decoder(tmp_path / "m.gguf"), theirs)


def test_a_quantised_weight_is_dequantised(theirs, tmp_path):
    write(tmp_path / "m.gguf", theirs, quantised="blk.1.ffn_up.weight")
    ours = load_decoder(tmp_path / "m.gguf").blocks[1].up.weight
    original = theirs.model.layers[1].mlp.up_proj.weight
    assert not torch.equal(ours, original)
    torch.testing.assert_close(ours, original, atol=0.01, rtol=0)


def test_a_missing_weight_is_named(theirs, tmp_path):
    write(tmp_path / "m.gguf", theirs, drop="blk.0.ffn_gate.weight")
    with pytest.raises(ModelError, match=r"1 missing: blk\.0\.ffn_gate\.weight"):
        load_decoder(tmp_path / "m.gguf")


@pytest.mark.parametrize("keep", [0, 3, 50, 700, -64])
def test_truncated_files_are_named(theirs, tmp_path, keep):
    path = tmp_path / "m.gguf"
    write(path, theirs)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"m\.gguf"):
        load_decoder(path)


def test_garbage_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(range(256)) * 16)
    with pytest.raises(ModelError, match="not a whole GGUF"):
        load_decoder(path)
