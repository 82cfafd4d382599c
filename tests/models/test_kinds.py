"""What every model kind must hold: the same suite for all of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import upslope
from tests.conftest import make_recipe
from tests.models.kinds import NAMES, SCRATCH, VOCAB, tiny
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.algo import token_logprobs
from upslope.errors import Interrupted, ModelError
from upslope.models.open import KINDS, load_model, make_runner, save_model
from upslope.ragged import Ragged

KINDS_MADE = [kind for kind in KINDS if KINDS[kind].scratch and kind != "encoder"]  # it writes no text
PROMPT, ANSWERS = [7, 8, 9], [[1, 2], [3], [4, 5, 6, 7]]
OTHERS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return tiny(name)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def behind_prompts(groups):
    """(prompt, answers) groups: every prompt a parent, its answers the children."""
    rows, parents = [], []
    for prompt, answers in groups:
        parents += [-1, *[len(rows)] * len(answers)]
        rows += [prompt, *answers]
    return Ragged.of(rows, parents)


def logprobs(model, batch, temperature=1.0):
    """logp of every child's tokens, in order."""
    children = [b for b, p in enumerate(batch.parent) if p >= 0]
    places = torch.cat([torch.arange(batch.starts[b], batch.starts[b + 1]) for b in children])
    hidden = model.hidden(batch)[batch.previous[places]]
    return token_logprobs(hidden, model.output_weight, batch.ids_N[places], temperature=temperature)[0]


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_the_contract(model):
    width = model.config.width
    assert model.config.vocab_size == VOCAB and width in (16, 17) and model.config.context == 64
    assert model.output_weight.shape == (VOCAB, width) and len(model.blocks) >= 1
    hidden = model.hidden(behind_prompts([(PROMPT, ANSWERS)]))
    assert hidden.shape == (10, width) and hidden.dtype == model.compute_dtype == torch.float32


def test_c39_there_is_no_dropout(model):
    batch = behind_prompts([(PROMPT, ANSWERS)])
    assert torch.equal(model.train().hidden(batch), model.eval().hidden(batch))


def test_the_lowest_layers_are_its_embeddings_and_its_lowest_blocks(model):
    """As freeze_layers leaves them: none of the blocks above, and no output of its own."""
    low = {id(p) for p in model.lowest(1)}
    assert {id(p) for p in model.blocks[0].parameters()} < low
    above = [p for block in model.blocks[1:] for p in block.parameters()]
    assert not low & {id(p) for p in above}
    names = {name for name, p in model.named_parameters() if id(p) in low}
    assert any("embed" in name for name in names) and not any("head" in name for name in names)


def test_what_it_predicts_depends_on_all_that_came_before(model):
    one = logprobs(model, behind_prompts([([7, 8, 9], [[1, 2]])]))
    for changed in ([6, 8, 9], [7, 6, 9], [7, 8, 6]):
        assert (one - logprobs(model, behind_prompts([(changed, [[1, 2]])]))).abs().max() > 1e-3
    assert (one.exp() - 1 / VOCAB).abs().max() > 0.01  # far from uniform


def test_c11_c15_a_row_alone_equals_the_row_in_a_batch(model):
    groups = [(PROMPT, ANSWERS), *((other[:1], [other[1:]]) for other in OTHERS)]
    together = logprobs(model, behind_prompts(groups))
    alone = [logprobs(model, behind_prompts([(p, [a])])) for p, answers in groups for a in answers]
    close(together, torch.cat(alone))
    close(logprobs(model, behind_prompts(groups[::-1]))[-7:], together[:7])


def test_c12_a_shared_prompt_equals_the_prompt_repeated_in_values_and_gradients(model):
    weights = torch.linspace(-1, 1, 7)
    one = logprobs(model, behind_prompts([(PROMPT, ANSWERS)]))
    one_grads = grads(model, one @ weights)
    other = logprobs(model, behind_prompts([(PROMPT, [a]) for a in ANSWERS]))
    close(one, other)
    for a, b in zip(one_grads, grads(model, other @ weights), strict=True):
        close(a, b, atol=3e-4)


def test_c12_a_prompt_as_parent_equals_the_whole_text(model):
    if model.needs_source:
        pytest.skip("its prompt is always a parent")
    batch = Ragged.of([PROMPT + a for a in ANSWERS])
    places = torch.cat([torch.arange(s + 3, e) for s, e in zip(batch.starts, batch.starts[1:], strict=False)])
    hidden = model.hidden(batch)[batch.previous[places]]
    whole = token_logprobs(hidden, model.output_weight, batch.ids_N[places])[0]
    close(whole, logprobs(model, behind_prompts([(PROMPT, ANSWERS)])))


def test_c22_what_other_sequences_hold_never_leaks(model):
    before = logprobs(model, behind_prompts([(PROMPT, [[1, 2, 3]]), ([5], [[4, 5, 6, 7]])]))[:3]
    after = logprobs(model, behind_prompts([(PROMPT, [[1, 2, 3]]), ([9], [[30, 29, 28, 27]])]))[:3]
    close(before, after, atol=1e-6)


def test_c1_no_token_sees_itself_or_later_ones(model):
    one = logprobs(model, behind_prompts([(PROMPT, [[1, 2, 3, 4]])]))
    other = logprobs(model, behind_prompts([(PROMPT, [[1, 2, 9, 9]])]))
    close(one[:2], other[:2])


def test_c1_log_probabilities_of_all_answers_sum_to_one(model):
    batch = behind_prompts([(PROMPT, [[a, b] for a in range(VOCAB) for b in range(VOCAB)])])
    assert logprobs(model, batch).view(-1, 2).sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-4)


def test_an_empty_answer_takes_nothing_from_the_others(model):
    full = logprobs(model, behind_prompts([(PROMPT, [[1, 2], [3]])]))
    close(logprobs(model, behind_prompts([(PROMPT, [[1, 2], [], [3]])])), full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_c14_prefill_and_steps_equal_the_forward_pass(model, dtype):
    """Prompts into several slots, slots moved as sequences end: each step's distribution is the forward pass's."""
    model.compute_dtype = dtype
    runner = make_runner(model, dtype=dtype)
    cache = runner.new_cache(4, 16)
    prompts = [PROMPT, OTHERS[1]]
    last = runner.prefill(cache, Ragged.of(prompts), [[0, 2], [1]])
    rows = [last[0], last[1], last[0]]
    texts = {0: (0, ANSWERS[2]), 1: (1, [3, 3]), 2: (0, ANSWERS[0])}
    seen = {slot: [] for slot in texts}
    live = [0, 1, 2]
    for t in range(4):
        for place, slot in enumerate(live):
            logits = torch.nn.functional.linear(rows[place], runner.output_weight).float()
            seen[slot].append(torch.log_softmax(logits, -1)[texts[slot][1][t]])
        ended = [p for p, s in enumerate(live) if len(texts[s][1]) == t + 1]
        for place in reversed(ended):  # the last slot takes the place that has become free
            cache.move(len(live) - 1, place)
            live[place] = live[-1]
            live.pop()
        if live:
            rows = runner.step(cache, torch.tensor([texts[s][1][t] for s in live]))
    expected = logprobs(model, behind_prompts([(prompts[p], [a]) for p, a in texts.values()])).float()
    found = torch.stack([x for slot in texts for x in seen[slot]])
    torch.testing.assert_close(found, expected.detach(), atol=1e-5 if dtype == torch.float32 else 0.15, rtol=1e-5)


def test_a_runner_takes_over_new_weights_and_its_checksum_tells_which(name):
    model, other = tiny(name), tiny(name, seed=1)
    runner = make_runner(model, dtype=torch.float32)
    assert runner.checksum() == runner.checksum_of(model) != runner.checksum_of(other)
    runner.load(other)
    assert runner.checksum() == runner.checksum_of(other)
    last = runner.prefill(runner.new_cache(1, 8), Ragged.of([PROMPT]), [[0]])
    batch = behind_prompts([(PROMPT, [[1]])])
    close(last[0], other.hidden(batch)[batch.previous[3]])
    with torch.no_grad():
        for parameter in other.parameters():
            before = runner.checksum_of(other)
            parameter.view(-1)[-1] += 0.5
            assert runner.checksum_of(other) != before
    assert runner.checksum() != runner.checksum_of(other)  # a copy, not a view


def test_bf16_products_stay_near_fp32(model):
    batch = behind_prompts([(PROMPT, ANSWERS), *((other[:1], [other[1:]]) for other in OTHERS)])
    wide = logprobs(model, batch)
    model.compute_dtype = torch.bfloat16
    hidden = model.hidden(batch)
    assert hidden.dtype == torch.bfloat16
    gap = (logprobs(model, batch) - wide).abs()
    assert 0 < gap.max() < 0.5 and gap.mean() < 0.1


def test_c44_fp32_weights_keep_small_updates_under_bf16_products(model):
    model.compute_dtype = torch.bfloat16
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    logprobs(model, behind_prompts([(PROMPT, ANSWERS)])).sum().backward()
    optimizer.step()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)


def test_save_and_load_give_the_same_model(model, tmp_path):
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(model) and again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    assert load_model(tmp_path, dtype=torch.bfloat16).output_weight.dtype == torch.bfloat16


def test_damaged_folders_are_one_line(model, tmp_path):
    save_model(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    first = sorted(weights)[0]
    for changed in (
        {k: v for k, v in weights.items() if k != first},
        weights | {first: torch.zeros(3, 5)},
        weights | {"surprise": torch.zeros(1)},
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)
    save_file(weights, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    numbers = [key for key, value in raw.items() if type(value) is int and not key.endswith("_token_id")]
    for key in numbers:
        for wrong in (None, "x", -1, True, 1 << 60):
            (tmp_path / "config.json").write_text(json.dumps(raw | {key: wrong}))
            try:
                load_model(tmp_path)
            except ModelError as error:
                assert "\n" not in str(error)
    (tmp_path / "config.json").write_text(json.dumps(raw | {numbers[0]: "x"}))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 7)
    with pytest.raises(ModelError):
        load_model(tmp_path)


def test_beyond_the_context_is_an_error_with_both_numbers(model):
    prompt, answer = (2, 65) if model.needs_source else (60, 5)  # a source has a context of its own
    with pytest.raises(ModelError, match="65 tokens exceeds the model's context of 64"):
        model.hidden(behind_prompts([([1] * prompt, [[1] * answer])]))


@pytest.mark.parametrize("name", SCRATCH)
def test_weights_come_from_the_seed_alone(name):
    one, two, other = (tiny(name, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.output_weight, other.output_weight)


def test_a_new_model_learns(name):
    """From its own initial weights: a few sentences by heart."""
    model = tiny(name, scale=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    batch = behind_prompts([([20 + k], [[k, k + 1, k + 2, k + 3]]) for k in range(4)])
    losses = []
    for _ in range(120):
        loss = -logprobs(model, batch).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


@sdpa_kernel(SDPBackend.MATH)  # as TRPO's update computes: the fused attention has no second derivative
def test_second_derivatives_equal_differences_of_first_ones(name):
    """What TRPO needs: products of the Hessian with a vector, against a central difference of gradients in float64."""
    model = tiny(name, scale=1.0).double()
    model.compute_dtype = torch.float64
    parameters = list(model.parameters())
    batch = behind_prompts([(PROMPT, ANSWERS)])
    generator = torch.Generator().manual_seed(5)
    vector = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def value():
        hidden = model.hidden(batch)[batch.previous[torch.arange(3, 10)]]
        logits = torch.log_softmax(hidden @ model.output_weight.t(), -1)
        return -logits[torch.arange(7), batch.ids_N[3:]].mean()

    first = torch.autograd.grad(value(), parameters, create_graph=True)
    plain = torch.autograd.grad(value(), parameters)
    for a, b in zip(first, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    slope = sum((g * v).sum() for g, v in zip(first, vector, strict=True))
    second = torch.autograd.grad(slope, parameters)
    ends, step = [], 3e-6  # as small as the curvature of a norm of small numbers asks for
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, vector, strict=True):
                p.add_(v, alpha=sign * step)
        ends.append(torch.autograd.grad(value(), parameters))
        with torch.no_grad():
            for p, v in zip(parameters, vector, strict=True):
                p.sub_(v, alpha=sign * step)
    for a, up, down in zip(second, *ends, strict=True):
        torch.testing.assert_close(a, (up - down) / (2 * step), atol=1e-6, rtol=1e-4)


def recipe_of(name, **rl):
    recipe = make_recipe("none")
    recipe["reward"] |= {"freeze_layers": 1}
    recipe["sft"] = {"steps": 2, "batch": 4, "freeze_layers": 1}
    recipe["rl"] |= {"critic": "separate", "value_loss": "huber", "steps": 2, "epochs": 1, "minibatches": 2} | rl
    if name.startswith("encdec"):  # pairs of whole texts have no source
        columns = {"prompt": "film", "completion": "text", "chosen": "text", "rejected": "other"}
        recipe["data"] = {"rows": "given", "group": "film", "valid": 0.2, "test": 0.2} | columns
    return recipe | {"model": SCRATCH[name]}


@pytest.fixture
def rows(rows):
    return [row | {"other": rows[i - 3]["text"]} for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", KINDS_MADE)
def test_c55_a_run_that_is_stopped_and_resumed_ends_bit_for_bit_as_an_unbroken_one(name, rows, tmp_path, monkeypatch):
    whole = upslope.train(recipe_of(name), rows=rows, out=tmp_path / "whole", plain=True)
    stopped = 0
    for at in (9, 14, 25):
        with monkeypatch.context() as patch:
            stop_at_ask(patch, at)
            try:
                upslope.train(recipe_of(name), rows=rows, out=tmp_path / "broken", plain=True)
            except Interrupted:
                stopped += 1
    upslope.train(recipe_of(name), rows=rows, out=tmp_path / "broken", plain=True)
    assert stopped >= 2
    same(outcome(whole), outcome(tmp_path / "broken"))


@pytest.mark.parametrize("critic", ["shared", "detached", "separate"])
@pytest.mark.parametrize("name", KINDS_MADE)
def test_every_critic_and_trpo_run(name, critic, rows, tmp_path):
    reward = {"reward": "tests.scores:count_lower", "critic": critic, "freeze_layers": 1}
    trpo = {"algorithm": "trpo", "value_loss": "squared", "minibatches": 1}
    recipe = recipe_of(name, **reward, **(trpo if critic != "shared" else {}))
    del recipe["reward"], recipe["sft"]
    run = upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    start, end = (load_file(run / stage / "model" / "model.safetensors") for stage in ("start", "rl"))
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    assert moved and not any("embed" in key for key in moved)
    critics = load_file(run / "rl" / "critic.safetensors")
    assert any(tensor.abs().max() > 0 for tensor in critics.values())
    assert any(key.startswith("critic_trunk.") for key in critics) == (critic == "separate")


def test_the_table_of_kinds_is_covered():
    """But an encoder, whose one action is a label: test_encoder.py and test_classify.py."""
    assert {name.partition("-")[0] for name in NAMES} == set(KINDS) - {"encoder"}
