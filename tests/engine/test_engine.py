import pytest
import torch

from tests.conftest import tiny_decoder
from upslope.algo.random import uniform
from upslope.engine import Engine, Request, Sampling
from upslope.errors import DataError, Interrupted, RecipeError, RunError
from upslope.models.heads import ActorCritic, Cut
from upslope.models.runner import DecoderRunner
from upslope.ragged import Ragged

EOS = 0
PROMPTS = [(3, 1, 4), (1,), (5, 9, 2, 6), (5, 3), (5, 8, 9, 7, 9)]


def engine_of(model, slots=64, **options):
    engine = Engine(DecoderRunner(model, dtype=torch.float32), eos_id=EOS, slots=slots, seed=5, **options)
    engine.load(model, version=1)
    return engine


def naive(model, request, sample, step, seed=5):
    """One sample by the whole model anew for each token, and the inverse of one cumulative sum."""
    ids, logps = list(request.prompt_ids), []
    for position in range(request.sampling.max_tokens):
        logits = model.hidden(Ragged.of([ids]).to(model.device))[-1] @ model.output_weight.t()
        temperature = request.sampling.temperature
        logp = torch.log_softmax(logits / (temperature or 1.0), -1).detach()
        if temperature == 0:
            token = int(logp.argmax())
        else:
            u = uniform(seed, step, request.key, sample, position).item()
            token = int((logp.double().exp().cumsum(0) <= u).sum())
        ids.append(token)
        logps.append(logp[token].item())
        if token == EOS:
            break
    return ids[len(request.prompt_ids) :], logps


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_c14_equal_to_a_naive_uncached_loop_whatever_the_slots(temperature, slots):
    model = tiny_decoder(scale=4.0)
    requests = [
        Request(p, key=k, samples=2, sampling=Sampling(max_tokens=4 + 3 * k, temperature=temperature))
        for k, p in enumerate(PROMPTS)
    ]
    found = engine_of(model, slots).generate(requests, step=7)
    assert [(c.request, c.sample) for c in found] == [(r, s) for r in range(5) for s in range(2)]
    for c in found:
        ids, logps = naive(model, requests[c.request], c.sample, step=7)
        assert c.ids == ids
        assert c.logp == pytest.approx(logps, abs=1e-5)
        assert c.finish == ("eos" if ids[-1] == EOS else "length") and c.terminal == (c.finish == "eos")
    assert len({len(c.ids) for c in found}) > 2  # they did end at different times


def test_c57_the_order_and_company_of_requests_change_nothing():
    model = tiny_decoder(scale=4.0)
    requests = [Request(p, key=k, samples=3, sampling=Sampling(max_tokens=8)) for k, p in enumerate(PROMPTS)]
    straight = {
        (r.key, c.sample): c.ids for c in engine_of(model).generate(requests, step=1) for r in [requests[c.request]]
    }
    back = requests[::-1]
    turned = {(r.key, c.sample): c.ids for c in engine_of(model, 2).generate(back, step=1) for r in [back[c.request]]}
    assert straight == turned
    other = engine_of(model).generate(requests, step=2)
    assert [c.ids for c in other] != list(straight.values())


def test_samples_of_one_prompt_differ_and_their_prompt_is_computed_once():
    model = tiny_decoder(scale=2.0)
    runner = DecoderRunner(model, dtype=torch.float32)
    computed = []
    inner = runner.prefill
    runner.prefill = lambda cache, prompts, slots: computed.append(prompts.tokens) or inner(cache, prompts, slots)
    engine = Engine(runner, eos_id=EOS, seed=1)
    found = engine.generate([Request((1, 2, 3), key=0, samples=8, sampling=Sampling(max_tokens=6))], step=0)
    assert computed == [3]
    assert len({tuple(c.ids) for c in found}) > 1


def test_stop_texts_that_span_tokens_end_a_completion():
    model = tiny_decoder(scale=4.0)
    spell = lambda ids: "".join(chr(ord("a") + i % 26) for i in ids)
    free = engine_of(model).generate([Request((3, 1), key=0, sampling=Sampling(max_tokens=12))], step=3)[0]
    stop = spell(free.ids[4:7])
    engine = engine_of(model, text_of=spell)
    cut = engine.generate([Request((3, 1), key=0, sampling=Sampling(max_tokens=12, stop=(stop,)))], step=3)[0]
    end = spell(free.ids).index(stop) + len(stop)
    assert cut.ids == free.ids[:end] and cut.finish == "stop" and cut.terminal


def test_vocabulary_padding_is_never_sampled():
    model = tiny_decoder(scale=0.1)  # nearly uniform over 31 entries
    engine = engine_of(model, valid_vocab=20)
    requests = [Request((1,), key=k, sampling=Sampling(max_tokens=20)) for k in range(20)]
    tokens = [t for c in engine.generate(requests, step=0) for t in c.ids]
    assert max(tokens) < 20 and len(tokens) > 100


def test_errors_come_before_any_work():
    engine = engine_of(tiny_decoder())
    with pytest.raises(DataError, match="prompt 1 has 60 tokens and may get 8 more; the model's context is 64"):
        engine.generate([Request((1,), 0, Sampling(8)), Request((1,) * 60, 1, Sampling(8))], step=0)
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        engine.generate([Request((), 0, Sampling(8))], step=0)
    with pytest.raises(DataError, match="no tokenizer"):
        engine.generate([Request((1,), 0, Sampling(8, stop=("x",)))], step=0)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"stop": ("",)}, {"max_tokens": 0}):
        with pytest.raises(RecipeError):
            Sampling(**{"max_tokens": 4, **wrong})


def test_nothing_asked_nothing_answered_and_a_stop_is_heard():
    engine = engine_of(tiny_decoder())
    assert engine.generate([], step=0) == []
    with pytest.raises(Interrupted):
        engine.generate([Request((1,), 0, Sampling(8))], step=0, should_stop=lambda: True)


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True}, {"norm": "layer", "position": "learned", "mlp": "plain"}])
@pytest.mark.parametrize("place", ["blocks.1.k.weight", "blocks.0.down.weight", "norm.weight", "embed.weight"])
def test_c50_weights_that_did_not_arrive_are_noticed(shape, place, monkeypatch):
    model = tiny_decoder(**shape)
    engine = engine_of(model)
    engine.load(model, version=2)  # nothing changed, and nothing is missing
    monkeypatch.setattr(engine.runner, "load", lambda model: None)
    with torch.no_grad():
        model.get_parameter(place).view(-1)[3] += 0.25
    with pytest.raises(RunError, match="version 3 did not reach the engine"):
        engine.load(model, version=3)
    monkeypatch.undo()
    engine.load(model, version=3)
    assert engine.version == 3


def test_c50_layers_that_change_places_are_noticed():
    model = tiny_decoder()
    engine = engine_of(model)
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]
    assert engine.runner.checksum() != engine.runner.checksum_of(model)


def test_c18_a_mask_of_another_model_cuts_what_is_sampled_and_what_is_reported():
    """NLPO: the policy samples among the tokens that the mask finds likely, and says their renormalised log-probs."""
    model, mask = tiny_decoder(scale=4.0), tiny_decoder(3, scale=4.0)
    engine = engine_of(model, slots=3, mask_runner=DecoderRunner(mask, dtype=torch.float32))
    engine.load(model, version=2 - 1, mask=mask)
    sampling = Sampling(max_tokens=6, top_p=0.7)
    requests = [Request(p, key=k, samples=2, sampling=sampling) for k, p in enumerate(PROMPTS)]
    critic = ActorCritic(model, "none")
    cut_off = 0
    for c in engine.generate(requests, step=1):
        ids = [*PROMPTS[c.request], *c.ids]
        actions = torch.arange(len(ids) - len(c.ids), len(ids))
        with torch.no_grad():
            scores = critic.evaluate(Ragged.of([ids]), actions, cut=Cut(mask, 0, 0.7))
            full = critic.evaluate(Ragged.of([ids]), actions)
        assert c.logp == pytest.approx(scores.logp_A.tolist(), abs=1e-5)
        cut_off += int((scores.logp_A > full.logp_A + 1e-3).sum())
    assert cut_off > 10
