import pytest
import torch

from tests.conftest import tiny_config, tiny_decoder
from upslope.algo import token_logprobs
from upslope.errors import ModelError
from upslope.models import attention
from upslope.models.decoder import Decoder, rope_frequencies
from upslope.ragged import Ragged

SHAPES = {
    "llama": {},
    "untied": {"tied": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "window": {"sliding_window": 3},
    "gpt2": dict(
        norm="layer",
        position="learned",
        mlp="plain",
        activation="gelu_tanh",
        kv_heads=4,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),
}
SEQUENCES = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9], [3]]


@pytest.fixture(params=SHAPES)
def model(request):
    return tiny_decoder(**SHAPES[request.param])


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_c11_a_row_alone_equals_the_row_in_a_batch(model):
    together = model.hidden(Ragged.of(SEQUENCES)).split([len(s) for s in SEQUENCES])
    for sequence, rows in zip(SEQUENCES, together, strict=True):
        close(model.hidden(Ragged.of([sequence])), rows)


def test_c12_a_shared_prefix_equals_the_prompt_repeated(model):
    prompt, answers = [7, 8, 9], [[1, 2], [3], [4, 5, 6, 7]]
    shared = Ragged.of([prompt, *answers], [-1, 0, 0, 0])
    repeated = Ragged.of([prompt + a for a in answers])
    weights = torch.linspace(-1, 1, sum(map(len, answers)))

    def loss(batch, first):
        places = torch.cat([torch.arange(batch.starts[b] + s, batch.starts[b + 1]) for b, s in first])
        hidden = model.hidden(batch)
        logp, _ = token_logprobs(hidden[batch.previous[places]], model.output_weight, batch.ids_N[places])
        model.zero_grad()
        (logp @ weights).backward()
        return logp.detach(), [p.grad.clone() for p in model.parameters()]

    one = loss(shared, [(1, 0), (2, 0), (3, 0)])
    other = loss(repeated, [(0, 3), (1, 3), (2, 3)])
    close(one[0], other[0])
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_the_fused_kernel_equals_the_plain_product(model, monkeypatch):
    batch = Ragged.of([*SEQUENCES, [1, 2]], [-1, -1, -1, -1, 0])
    plain = model.hidden(batch)
    monkeypatch.setattr(attention, "PLAIN_KEYS", 0)
    close(model.hidden(batch), plain)


def test_c22_what_later_sequences_hold_never_leaks(model):
    before = model.hidden(Ragged.of([[1, 2, 3], [4, 5, 6, 7, 8]]))[:3]
    after = model.hidden(Ragged.of([[1, 2, 3], [30, 29, 28, 27, 26]]))[:3]
    assert torch.equal(before, after)


def test_causality(model):
    close(model.hidden(Ragged.of([[1, 2, 3, 4]]))[:2], model.hidden(Ragged.of([[1, 2, 9, 9]]))[:2])


def test_c1_log_probabilities_of_all_sequences_sum_to_one(model):
    # every continuation of [2] by two tokens: their probabilities, read as training reads them, make a distribution
    batch = Ragged.of([[2, a, b] for a in range(31) for b in range(31)])
    places = torch.nonzero(batch.previous >= 0).squeeze(1)
    hidden = model.hidden(batch)
    logp, _ = token_logprobs(hidden[batch.previous[places]], model.output_weight, batch.ids_N[places])
    assert logp.view(-1, 2).sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-4)


def test_c39_there_is_no_dropout(model):
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    batch = Ragged.of(SEQUENCES)
    assert torch.equal(model.train().hidden(batch), model.eval().hidden(batch))


def test_c44_master_weights_keep_small_updates():
    model = tiny_decoder()
    model.compute_dtype = torch.bfloat16
    before = model.blocks[0].q.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model.hidden(Ragged.of(SEQUENCES)).float().sum().backward()
    optimizer.step()
    assert model.blocks[0].q.weight.dtype == torch.float32
    assert not torch.equal(model.blocks[0].q.weight, before)


def test_beyond_the_context_is_an_error_with_both_numbers():
    with pytest.raises(ModelError, match="65 tokens exceeds the model's context of 64"):
        tiny_decoder().hidden(Ragged.of([[1] * 65]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "4 heads do not divide among 3"),
        ({"norm": "batch"}, "norm 'batch'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
    ],
)
def test_shapes_that_cannot_be(changes, message):
    with pytest.raises(ModelError, match=message):
        Decoder(tiny_config(**changes))


def test_rope_scaling_by_hand():
    plain = rope_frequencies(tiny_config(head_dim=8))
    linear = rope_frequencies(tiny_config(head_dim=8, rope_scaling={"rope_type": "linear", "factor": 4.0}))
    close(linear, plain / 4)


def test_weights_come_from_the_seed_alone():
    one, two, other = (Decoder(tiny_config()).init_weights(s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)
