import pytest
import torch

from tests.conftest import tiny_decoder
from tests.models.test_decoder import SHAPES
from upslope.kernels import cpu
from upslope.models.runner import DecoderRunner
from upslope.ragged import Ragged


@pytest.mark.parametrize("shape", SHAPES)
def test_c14_cached_steps_equal_the_uncached_model(shape):
    model = tiny_decoder(**SHAPES[shape])
    runner = DecoderRunner(model, dtype=torch.float32)
    cache = runner.new_cache(4, 20)
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    texts = [*prompts, list(prompts[1])]
    last = runner.prefill(cache, Ragged.of(prompts), [[0], [1, 3], [2]])
    expected = torch.stack([model.hidden(Ragged.of([p]))[-1] for p in prompts])
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
    for step in range(6):
        ids = [(7 * step + s) % 31 for s in range(4)]
        hidden = runner.step(cache, torch.tensor(ids))
        for slot, token in enumerate(ids):
            texts[slot].append(token)
            whole = model.hidden(Ragged.of([texts[slot]]))[-1]
            torch.testing.assert_close(hidden[slot], whole, atol=1e-5, rtol=1e-5)


def test_a_moved_slot_goes_on_where_it_was():
    model = tiny_decoder()
    runner = DecoderRunner(model, dtype=torch.float32)
    cache = runner.new_cache(2, 8)
    runner.prefill(cache, Ragged.of([[1, 2, 3], [4, 5]]), [[0], [1]])
    cache.move(1, 0)
    hidden = runner.step(cache, torch.tensor([6]))
    torch.testing.assert_close(hidden[0], model.hidden(Ragged.of([[4, 5, 6]]))[-1], atol=1e-5, rtol=1e-5)


def test_c50_weights_arrive_and_the_checksum_says_so():
    model, other = tiny_decoder(0), tiny_decoder(1)
    runner = DecoderRunner(model, dtype=torch.float32)
    before = runner.checksum()
    runner.load(other)
    assert runner.checksum() != before
    cache = runner.new_cache(1, 4)
    last = runner.prefill(cache, Ragged.of([[1, 2]]), [[0]])
    torch.testing.assert_close(last, other.hidden(Ragged.of([[1, 2]]))[-1:], atol=1e-5, rtol=1e-5)
    runner.load(model)
    assert runner.checksum() == before


def test_the_trainer_does_not_change_what_the_engine_holds():
    model = tiny_decoder()
    runner = DecoderRunner(model, dtype=torch.float32)
    before = runner.checksum()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert runner.checksum() == before


@pytest.mark.skipif(not cpu.multiplies(), reason="this processor has no instructions for products in bf16")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape", [{}, {"qkv_bias": True, "mlp_bias": True}, {"sliding_window": 3}, {"position": "learned"}, {"kv_heads": 4}]
)
def test_the_compiled_step_is_the_layers_one_by_one(shape, threads):
    model = tiny_decoder(width=64, head_dim=32, ffn_width=72, scale=2.0, **shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    found, before = [], torch.get_num_threads()
    try:
        for whole in (True, False):
            torch.set_num_threads(threads if whole else before)
            runner = DecoderRunner(model, dtype=torch.bfloat16)
            assert runner.steps is not None
            runner.steps = runner.steps if whole else None
            cache = runner.new_cache(3, 40)
            runner.prefill(cache, Ragged.of([[3, 1, 4], list(range(31))]), [[0, 2], [1]])
            found.append([runner.step(cache, torch.tensor([5, 6, step])) for step in range(4)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    exact = [model.hidden(Ragged.of([[3, 1, 4, 5, 5, 5, 5]]))[-1], model.hidden(Ragged.of([[3, 1, 4, 0, 1, 2, 3]]))[-1]]
    for slot, expected in zip((0, 2), (e.detach() for e in exact), strict=True):
        assert float((found[0][-1][slot].float() - expected).abs().max()) < 0.1 * float(expected.abs().max())
