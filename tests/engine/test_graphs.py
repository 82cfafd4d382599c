"""Generation by recorded steps. Where there is no GPU, the steps are not recorded and their kernels are stood in for by
what they are tested against (tests/kernels/test_gpu.py): Triton's interpreter would take minutes."""

import pytest
import torch

from tests.conftest import DEVICE, tiny_decoder
from tests.engine.test_engine import EOS, PROMPTS, naive
from upslope.algo.random import uniform
from upslope.engine import Engine, Request, Sampling
from upslope.engine.graphs import STEPS, Graphs, slots_recorded
from upslope.engine.sampling import sample
from upslope.errors import Interrupted
from upslope.kernels import gpu
from upslope.models.ops import rotate
from upslope.models.runner import DecoderRunner


def serve(*tensors):
    return True


def attend(qkv, rope, keys, values, length, heads, window):
    """`gpu.attend`, one softmax over the whole cache."""
    slots, (_, kv_heads, capacity, width) = len(length), keys.shape
    q, k, v = qkv.view(slots, -1, width).split([heads, kv_heads, kv_heads], dim=1)
    if rope is not None:
        place = length.clamp_max(len(rope[0]) - 1)
        q, k = (rotate(x, rope[0][place, None], rope[1][place, None]) for x in (q, k))
    row = torch.arange(slots)
    keys[row, :, length], values[row, :, length] = k, v
    k, v = (x[:slots].repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    scores = torch.einsum("shd,shtd->sht", q, k) * width**-0.5
    seen = torch.arange(capacity) <= length[:, None, None]
    weights = scores.masked_fill(~seen, -float("inf")).softmax(-1)
    return torch.einsum("sht,shtd->shd", weights, torch.where(seen[..., None], v, 0.0)).reshape(slots, -1)


def choose_next(logits, temperature, facts, key, ids, logp, valid):
    """`gpu.choose_next`, by the engine's random numbers and the CPU's choice."""
    n = len(logits)
    step = facts[1, :n] - facts[2, :n]
    seed, rollout = key.tolist()
    drawn = torch.from_numpy(
        uniform(seed, rollout, *(t.numpy() for t in (facts[3, :n], facts[4, :n], facts[5, :n] + step)))
    )
    chosen, score = sample(logits, temperature[:n], drawn, [0] * n, [1.0] * n, valid)
    ids[step, torch.arange(n)], logp[step, torch.arange(n)] = chosen, score
    facts[0, :n], facts[1, :n] = chosen, facts[1, :n] + 1


@pytest.fixture
def device(monkeypatch):
    if DEVICE.type == "cpu":
        for function in (serve, attend, choose_next):
            monkeypatch.setattr(gpu, function.__name__, function)
    return DEVICE


def engine_on(device, model, slots=64, **options):
    engine = Engine(DecoderRunner(model.to(device), dtype=torch.float32), eos_id=EOS, slots=slots, seed=5, **options)
    engine.load(model, version=1)
    return engine


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True, "qkv_bias": True}, {"norm": "layer", "position": "learned"}])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_c14_equal_to_a_naive_uncached_loop_whatever_the_slots(device, shape, slots):
    """Completions that end by themselves or by their limit, in the middle of a round or over several rounds."""
    model = tiny_decoder(scale=4.0, **shape)
    limits = [1, 4, STEPS + 5, 7, 2 * STEPS + 3]
    requests = [
        Request(p, key=k, samples=2, sampling=Sampling(max_tokens=limits[k], temperature=(1.0, 0.6, 0.0)[k % 3]))
        for k, p in enumerate(PROMPTS)
    ]
    engine = engine_on(device, model, slots)
    assert Graphs.serve(engine.runner, requests)
    counts = []
    for step in (7, 8):  # the second finds what the first has left
        found = engine.generate(requests, step=step, progress=lambda tokens, done: counts.append((tokens, done)))
        assert [(c.request, c.sample) for c in found] == [(r, s) for r in range(5) for s in range(2)]
        assert counts[-1] == (sum(len(c.ids) for c in found), len(found))
        for c in found:
            ids, logps = naive(model, requests[c.request], c.sample, step)
            assert c.ids == ids
            assert c.logp == pytest.approx(logps, abs=1e-4)
            assert c.finish == ("eos" if ids[-1] == EOS else "length")
    assert len({len(c.ids) for c in found}) > 3


def test_new_weights_reach_what_was_recorded(device):
    model = tiny_decoder(scale=4.0)
    engine = engine_on(device, model)
    request = Request((3, 1, 4), key=0, samples=3, sampling=Sampling(max_tokens=20))
    before = engine.generate([request], step=1)
    for parameter in model.parameters():
        parameter.data.mul_(-1.1)
    engine.load(model, version=2)
    for c in engine.generate([request], step=1):
        assert c.ids == naive(model, request, c.sample, step=1)[0]
    assert [c.ids for c in before] != [c.ids for c in engine.generate([request], step=1)]


def test_a_longer_prompt_after_a_shorter_one_finds_room(device):
    model = tiny_decoder(scale=4.0, context=256)
    engine = engine_on(device, model, slots=2)
    for length in (2, 120, 60):
        request = Request(tuple(1 + i % 30 for i in range(length)), key=0, samples=2, sampling=Sampling(max_tokens=18))
        for c in engine.generate([request], step=1):
            assert c.ids == naive(model, request, c.sample, step=1)[0]


def test_stop_texts_and_padding_of_the_vocabulary(device):
    spell = lambda ids: "".join(chr(ord("a") + i % 26) for i in ids)
    engine = engine_on(device, tiny_decoder(scale=4.0), text_of=spell)
    free = engine.generate([Request((3, 1), key=0, sampling=Sampling(max_tokens=24))], step=3)[0]
    stop = spell(free.ids[4:7])
    cut = engine.generate([Request((3, 1), key=0, sampling=Sampling(max_tokens=24, stop=(stop,)))], step=3)[0]
    end = spell(free.ids).index(stop) + len(stop)
    assert cut.ids == free.ids[:end] and cut.finish == "stop"
    engine = engine_on(device, tiny_decoder(scale=0.1), valid_vocab=20)
    found = engine.generate([Request((1,), key=0, samples=10, sampling=Sampling(max_tokens=20))], step=0)
    assert max(t for c in found for t in c.ids) < 20


def test_a_stop_is_heard_and_cut_distributions_are_not_recorded(device):
    engine = engine_on(device, tiny_decoder())
    with pytest.raises(Interrupted):
        engine.generate([Request((1,), 0, Sampling(8))], step=0, should_stop=lambda: True)
    for sampling in (Sampling(8, top_k=3), Sampling(8, top_p=0.9)):
        assert not Graphs.serve(engine.runner, [Request((1,), 0, sampling)])


def test_few_sizes_are_recorded_and_each_is_large_enough():
    sizes = {n: slots_recorded(n) for n in range(1, 1025)}
    assert all(n <= size < n + max(8, n / 3) for n, size in sizes.items())
    assert len(set(sizes.values())) == 24
