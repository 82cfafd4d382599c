import pytest
import torch

from tests.conftest import tiny_decoder
from tests.models.test_decoder import SHAPES
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
