"""What is computed on a GPU is what is computed on a CPU: each test runs on both, where there is a GPU."""

import pytest
import torch

import upslope
from tests.conftest import make_recipe, tiny_decoder
from tests.engine.test_engine import EOS, PROMPTS, naive
from tests.models.kinds import NAMES, tiny
from tests.training.test_pipeline import outcome, same
from upslope.algo import gae, token_logprobs
from upslope.config import Optim
from upslope.engine import Engine, Request, Sampling
from upslope.errors import Interrupted
from upslope.models.heads import ActorCritic
from upslope.models.open import make_runner
from upslope.models.runner import DecoderRunner
from upslope.ragged import Ragged
from upslope.text.examples import Example
from upslope.training.run import Run
from upslope.training.supervised import example_logprobs
from upslope.training.update import make_optimizer, never, optimizer_step

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SHAPES = {
    "tiny": {},
    "wide": dict(vocab_size=1000, width=256, heads=4, kv_heads=2, head_dim=64, ffn_width=512, context=512, scale=1.0),
    "qwen2": dict(vocab_size=999, width=128, heads=2, kv_heads=1, head_dim=64, ffn_width=304, qkv_bias=True, scale=2.0),
}
LENGTHS = (17, 1, 60, 33, 5, 64, 2)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=SHAPES)
def shape(request):
    return dict(SHAPES[request.param])


def drawn(model, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def gradients(model, texts):
    """The loss and every parameter's gradient of some texts, all learned."""
    model.zero_grad()
    loss = -example_logprobs(model, [Example(t, [True] * len(t), i) for i, t in enumerate(texts)]).sum()
    loss.backward()
    return float(loss.detach()), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


def apart(found, wanted):
    """The largest relative distance of any tensor from what is wanted; what is 0 but for rounding counts as small."""
    least = 1e-4 * max(float(w.norm()) for w in wanted.values())
    distance = {n: float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp_min(least)) for n in wanted}
    assert all(value == value for value in distance.values())
    return max(distance.values())


@pytest.mark.parametrize("slots", [3, 64])
def test_the_engine_writes_what_a_naive_loop_on_the_same_device_writes(device, slots):
    model = tiny_decoder(scale=4.0).to(device)
    engine = Engine(DecoderRunner(model, dtype=torch.float32), eos_id=EOS, slots=slots, seed=5)
    engine.load(model, version=1)
    requests = [Request(p, key=k, samples=2, sampling=Sampling(max_tokens=4 + 3 * k)) for k, p in enumerate(PROMPTS)]
    for c in engine.generate(requests, step=7):
        ids, logps = naive(model, requests[c.request], c.sample, step=7)
        assert c.ids == ids
        assert c.logp == pytest.approx(logps, abs=1e-5)


def test_the_engine_is_right_again_after_new_weights_and_other_requests(device):
    model, other = tiny_decoder(scale=4.0).to(device), tiny_decoder(seed=1, scale=4.0).to(device)
    engine = Engine(DecoderRunner(model, dtype=torch.float32), eos_id=EOS, slots=4, seed=5)
    for version, (source, tokens) in enumerate([(model, 6), (other, 6), (other, 20), (model, 3)]):
        engine.load(source, version=version)
        requests = [Request(p, key=k, sampling=Sampling(max_tokens=tokens)) for k, p in enumerate(PROMPTS)]
        for c in engine.generate(requests, step=version):
            assert c.ids == naive(source, requests[c.request], 0, step=version)[0]


def test_a_row_alone_is_the_row_in_a_batch_there_and_back(device, shape):
    model = tiny_decoder(**shape).to(device)
    texts = drawn(model)
    rows = model.hidden(Ragged.of(texts).to(device)).split([len(t) for t in texts])
    for text, row in zip(texts, rows, strict=True):
        torch.testing.assert_close(model.hidden(Ragged.of([text]).to(device)), row, atol=2e-5, rtol=2e-5)
    loss, together = gradients(model, texts)
    alone = [gradients(model, [text]) for text in texts if len(text) > 1]
    assert loss == pytest.approx(sum(one for one, _ in alone), rel=1e-5)
    assert apart({name: sum(g[name] for _, g in alone) for name in together}, together) < 1e-4


def test_a_shared_prompt_is_the_prompt_repeated(device, shape):
    model = tiny_decoder(**shape).to(device)
    prompt, *answers = drawn(model, (20, 7, 1, 30))
    shared = Ragged.of([prompt, *answers], [-1, 0, 0, 0])
    repeated = Ragged.of([prompt + answer for answer in answers])
    one, other = model.hidden(shared.to(device)), model.hidden(repeated.to(device))
    for b, answer in enumerate(answers):
        last = other[repeated.starts[b + 1] - len(answer) : repeated.starts[b + 1]]
        torch.testing.assert_close(one[shared.starts[b + 1] : shared.starts[b + 2]], last, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_gradient_is_that_of_a_cpu_in_float64(device, shape, dtype, limit):
    exact = tiny_decoder(**shape).double()
    exact.compute_dtype = torch.float64
    loss, wanted = gradients(exact, drawn(exact))
    model = tiny_decoder(**shape).to(device)
    model.compute_dtype = dtype
    found_loss, found = gradients(model, drawn(model))
    assert found_loss == pytest.approx(loss, rel=limit)
    assert apart(found, wanted) < limit


def test_an_optimizer_step_is_the_same_in_any_micro_batches(device):
    texts = drawn(tiny_decoder())
    moved = []
    for cut in ([[0, 1, 2, 3, 4, 5, 6]], [[5, 2], [0], [1, 3, 4, 6]]):
        model = tiny_decoder(scale=2.0).to(device)
        optimizer = make_optimizer(model, Optim(lr=1e-2))

        def loss_of(part, model=model):
            examples = [Example(texts[i], [True] * len(texts[i]), i) for i in part]
            return -example_logprobs(model, examples).sum() / 100, {}

        metrics = optimizer_step(model, optimizer, cut, loss_of, lr=1e-2, clip_norm=1.0, should_stop=never)
        moved.append((metrics["loss/total"], metrics["optim/grad_norm"]))
    assert moved[0] == pytest.approx(moved[1], rel=1e-5)


def test_log_probabilities_and_their_gradients_are_those_of_float64(device):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator)
    weight = 0.3 * torch.randn(5003, 64, generator=generator)
    target = torch.randint(5003, (300,), generator=generator)
    pull = torch.randn(300, generator=generator)

    def all_of(dtype, where, chunk):
        h, w = (x.to(where, dtype).requires_grad_() for x in (hidden, weight))
        logp, entropy = token_logprobs(h, w, target.to(where), temperature=0.7, chunk=chunk)
        grads = torch.autograd.grad(((logp + 0.3 * entropy) * pull.to(where, dtype)).sum(), (h, w))
        return dict(enumerate(x.detach().double().cpu() for x in (logp, entropy, *grads)))

    exact = all_of(torch.float64, "cpu", 300)
    for chunk in (None, 64):
        assert apart(all_of(torch.float32, device, chunk), exact) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_says_and_writes_what_it_does_on_a_cpu(device, name):
    """log-probabilities and gradients behind shared prompts, and what its runner samples."""
    found = {}
    for where in ("cpu", device):
        model = tiny(name).to(where)
        logp_A = pair_scores(model, Ragged.of([[7, 8, 9], [1, 2], [4, 5, 6], [5, 3]], [-1, 0, 0, -1]).to(where))
        logp_A.sum().backward()
        runner = make_runner(model, dtype=torch.float32)
        engine = Engine(runner, eos_id=(), slots=2, seed=5)
        engine.load(model, version=1)
        asked = [Request(p, key=k, samples=2, sampling=Sampling(max_tokens=5)) for k, p in enumerate(PROMPTS[:3])]
        written = [c.ids for c in engine.generate(asked, step=0)]
        grads = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
        found[str(where)] = logp_A.detach().cpu(), grads, written
    wanted, seen = found["cpu"], found[str(device)]
    torch.testing.assert_close(seen[0], wanted[0], atol=1e-4, rtol=1e-4)
    assert apart(seen[1], wanted[1]) < 1e-3 and seen[2] == wanted[2]


def pair_scores(model, batch):
    children = [b for b, p in enumerate(batch.parent) if p >= 0]
    place_A = torch.cat([torch.arange(batch.starts[b], batch.starts[b + 1]) for b in children])
    state_A = batch.previous[place_A].to(model.device)
    return token_logprobs(model.hidden(batch)[state_A], model.output_weight, batch.ids_N[place_A.to(model.device)])[0]


def test_scores_of_actions_with_a_critic(device):
    exact = ActorCritic(tiny_decoder(), "shared")
    model = ActorCritic(tiny_decoder(), "shared").to(device)
    for one in (exact, model):
        torch.nn.init.constant_(one.value_head.weight, 0.1)
    batch = Ragged.of([[1, 2, 3], [4, 5], [6, 7, 8]], [-1, 0, 0])
    action_A = torch.tensor([1, 3, 4, 6, 7])
    wanted, found = exact.evaluate(batch, action_A), model.evaluate(batch.to(device), action_A)
    for name in ("logp_A", "entropy_A", "value_A"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(wanted, name), atol=1e-5, rtol=1e-5)


def test_gae(device):
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(100, generator=generator), torch.randn(100, generator=generator)
    starts = torch.tensor([0, 7, 7, 60, 100])
    wanted = gae(reward.double(), value.double(), starts, gamma=0.9, lam=0.8)
    found = gae(reward.to(device), value.to(device), starts.to(device), gamma=0.9, lam=0.8)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, atol=1e-5, rtol=1e-5)


def test_bf16_sampling_is_near_the_trainers_numbers(device):
    model = tiny_decoder(**SHAPES["wide"]).to(device)
    model.compute_dtype = torch.bfloat16
    engine = Engine(DecoderRunner(model, dtype=torch.bfloat16), eos_id=(), slots=16, seed=5)
    engine.load(model, version=1)
    prompts = drawn(model, (9, 30, 4))
    requests = [Request(tuple(p), key=k, samples=4, sampling=Sampling(max_tokens=24)) for k, p in enumerate(prompts)]
    for c in engine.generate(requests, step=0):
        ids = [*prompts[c.request], *c.ids]
        learned = [i >= len(prompts[c.request]) for i in range(len(ids))]
        with torch.no_grad():
            logp = example_logprobs(model, [Example(ids, learned, 0)]).float().cpu()
        assert float((logp - torch.tensor(c.logp)).abs().max()) < 0.1


@no_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_the_gpu_that_is_stopped_ends_where_an_unbroken_one_ends(
    tmp_path, model_dir, rows, dtype, monkeypatch
):
    recipe = make_recipe(model_dir) | {"dtype": dtype}
    unbroken = outcome(upslope.train(recipe, rows=rows, out=tmp_path / "unbroken", plain=True))
    record, calls = Run.record, []

    def counted(run, kind, **fields):
        record(run, kind, **fields)
        calls.append(kind)
        if kind == "step" and calls.count("step") % 2 == 0:  # at every second step, of each stage
            run.stop_requested = True

    monkeypatch.setattr(Run, "record", counted)
    for _ in range(20):
        try:
            folder = upslope.train(recipe, rows=rows, out=tmp_path / "stopped", plain=True)
            break
        except Interrupted:
            continue
    else:
        raise AssertionError("the run never ended")
    assert len(calls) > 10
    same(outcome(folder), unbroken)
