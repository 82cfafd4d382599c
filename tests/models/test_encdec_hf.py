import pytest
import torch
import transformers

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
