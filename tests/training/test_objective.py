"""What no algorithm's optimizer step may depend on, and what its terms are."""

import dataclasses

import pytest
import torch

from tests.conftest import tiny_decoder
from tests.training.test_rollout import BASE, FakeRun, episode
from upslope.algo import token_logprobs
from upslope.config import PRESETS, load_recipe
from upslope.models.heads import ActorCritic
from upslope.training.episode import lay_out
from upslope.training.objective import Prices, minibatch_step
from upslope.training.rollout import Frozen, prepare
from upslope.training.state import RunState
from upslope.training.trust_region import trust_region_update

EPISODES = [
    episode([3, 1], [4, 1, 5], group=0, total=1.0),
    episode([3, 1], [9, 2], group=0, sample=1, total=-1.0, finish="length"),
    episode([6], [5, 3, 5, 8], group=1, total=0.5),
    episode([6], [3], group=1, sample=1, total=2.0, finish="length"),
]
TRUST = Prices(kl=0.3, trust=0.7)


def rl_of(name, **changes):
    own = {"teacher": "t"} if name == "gkd" else {"reward": "a:b"}
    base = {"algorithm": name, "prompts": 2, "samples": 2, "minibatches": 1, "max_tokens": 6}
    return load_recipe(BASE | {"rl": base | own | changes}).rl


def setup(rl, episodes=EPISODES):
    torch.manual_seed(0)
    model = ActorCritic(tiny_decoder(), rl.critic, None)
    if model.value_head is not None:
        torch.nn.init.normal_(model.value_head.weight, std=0.3)
    frozen = Frozen(tiny_decoder(9) if rl.uses_reference else None, tiny_decoder(7) if rl.mask_every else None)
    batch, _ = prepare(episodes, model, frozen, rl, 0.1)
    return model, frozen, batch


def stepped(rl, members=None, episodes=EPISODES, nudge=0.0):
    """The model after one step of plain gradient descent (or the trust region's), and its statistics."""
    model, frozen, batch = setup(rl, episodes)
    if nudge:  # so that ratios are not 1
        batch.old_logp_A = batch.old_logp_A + nudge * torch.sin(torch.arange(len(batch.old_logp_A)) * 1.0)
    members = list(range(len(batch.episodes))) if members is None else members
    if rl.update == "trust_region":
        return model, trust_region_update(rl, model.policy, batch, lambda: False)
    state = RunState("rl", model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model, minibatch_step(FakeRun, rl, state, batch, members, 0.1, frozen, TRUST)


def assert_same(first, second, atol=1e-5):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("budget", [1, 7])
@pytest.mark.parametrize("name", PRESETS)
def test_c27_c28_micro_batches_change_no_term_of_any_algorithm(name, budget):
    nudge = 0.3 if name != "trpo" else 0.0
    one, metrics = stepped(rl_of(name), nudge=nudge)
    other, cut = stepped(rl_of(name, optim={"micro_tokens": budget}), nudge=nudge)
    assert_same(one, other, atol=2e-4 if name == "trpo" else 1e-5)
    assert metrics == pytest.approx(cut, rel=1e-2 if name == "trpo" else 1e-3, abs=1e-5)


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("trpo", "raft")])
def test_c11_the_order_of_episodes_changes_nothing(name):
    one, _ = stepped(rl_of(name), nudge=0.3)
    other, _ = stepped(rl_of(name), members=[2, 0, 3, 1], nudge=0.3)
    assert_same(one, other)


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "raft"])
def test_c12_a_shared_prompt_is_as_good_as_one_for_each(name):
    """Episodes of one prompt without a common group are laid out apart: the same tokens, none of them shared."""
    rl = rl_of(name)
    whole, _ = stepped(rl)
    model, frozen, batch = setup(rl)
    batch.episodes = [dataclasses.replace(e, group=i) for i, e in enumerate(batch.episodes)]
    assert lay_out(batch.episodes)[0].tokens > lay_out(EPISODES)[0].tokens
    if rl.update == "trust_region":
        trust_region_update(rl, model.policy, batch, lambda: False)
    else:
        state = RunState("rl", model, torch.optim.SGD(model.parameters(), lr=0.1))
        minibatch_step(FakeRun, rl, state, batch, [0, 1, 2, 3], 0.1, frozen, TRUST)
    assert_same(whole, model, atol=2e-4 if name == "trpo" else 1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_c4_the_token_that_ends_gets_a_gradient(name):
    rl = rl_of(name)
    model, frozen, batch = setup(rl)
    if rl.update == "trust_region":
        before = model.policy.output_weight.detach().clone()
        trust_region_update(rl, model.policy, batch, lambda: False)
        assert bool((model.policy.output_weight != before)[5].any())
        return
    part_of_end = batch.rows([0])[-1]  # the first episode's last action, by which it ended
    batch.advantage_A = torch.zeros_like(batch.advantage_A)
    batch.advantage_A[part_of_end] = 1.0
    state = RunState("rl", model, torch.optim.SGD(model.policy.parameters(), lr=1.0))
    before = logp_of_end(model)
    for _ in range(3):
        minibatch_step(FakeRun, rl, state, batch, [0], 0.05, frozen, Prices(kl=rl.kl))
    assert logp_of_end(model) != before and (name == "gkd" or logp_of_end(model) > before)


def logp_of_end(model):
    batch, action_A = lay_out([EPISODES[0]])
    return model.evaluate(batch, action_A).logp_A[-1].item()


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "rloo", "dapo", "gspo", "cispo"])
def test_c25_a_rollout_of_equal_scores_moves_nothing(name):
    equal = [dataclasses.replace(e, total=0.3) for e in EPISODES]
    rl = rl_of(name, kl=0.0)
    model, metrics = stepped(rl, episodes=equal)
    start, _, _ = setup(rl)
    drift = Prices()
    assert drift == Prices(0.0, 0.0) and metrics["optim/grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_c51_importance_weights_correct_a_sampler_and_do_nothing_where_it_is_right():
    def gradient(shift, **keys):
        rl = rl_of("dr-grpo", **keys)
        model, frozen, batch = setup(rl)
        batch.behaviour_logp_A = batch.old_logp_A - shift
        state = RunState("rl", model, torch.optim.SGD(model.parameters(), lr=1.0))
        before = [p.detach().clone() for p in model.parameters()]
        metrics = minibatch_step(FakeRun, rl, state, batch, [0, 1, 2, 3], 1.0, frozen, Prices())
        moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        return torch.cat([m.flatten() for m in moved]), metrics

    clip = {"optim": {"clip_norm": 1e9}}
    plain, _ = gradient(torch.zeros(10), **clip)
    right, metrics = gradient(torch.zeros(10), importance="truncate", **clip)
    torch.testing.assert_close(plain, right)
    assert metrics["policy/importance_cut"] == 0.0
    doubled, _ = gradient(torch.full((10,), 0.5), importance="truncate", importance_cap=8.0, **clip)
    torch.testing.assert_close(doubled, plain * torch.tensor(0.5).exp(), atol=1e-6, rtol=1e-4)
    capped, metrics = gradient(torch.full((10,), 3.0), importance="truncate", **clip)
    torch.testing.assert_close(capped, plain * 2.0, atol=1e-6, rtol=1e-4)
    assert metrics["policy/importance_cut"] == 1.0
    masked, metrics = gradient(torch.full((10,), 3.0), importance="mask", **clip)
    assert metrics["policy/importance_cut"] == 1.0 and float(masked.abs().max()) == 0.0


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
def test_c32_the_kl_in_the_loss_has_the_gradient_of_its_estimator(estimator):
    rl = rl_of("gkd", kl_estimator=estimator, optim={"clip_norm": 1e9})
    model, frozen, batch = setup(rl)
    ragged, action_A = lay_out(EPISODES)
    state_A = ragged.previous[action_A]
    target_A = ragged.ids_N[action_A]

    def dense(decoder):
        return torch.log_softmax(decoder.hidden(ragged)[state_A] @ decoder.output_weight.t(), -1)

    logp_AV, ref_AV = dense(model.policy), dense(frozen.reference).detach()
    d_A = (logp_AV - ref_AV).gather(1, target_A[:, None]).squeeze(1)
    kl_A = {
        "k2": d_A**2 / 2,
        "k3": torch.exp(-d_A) - 1 + d_A,
        "exact": (logp_AV.exp() * (logp_AV - ref_AV)).sum(-1),
    }[estimator]
    expected = torch.autograd.grad(0.5 * kl_A.mean(), list(model.policy.parameters()))
    before = [p.detach().clone() for p in model.policy.parameters()]
    state = RunState("rl", model, torch.optim.SGD(model.parameters(), lr=1.0))
    metrics = minibatch_step(FakeRun, rl, state, batch, [0, 1, 2, 3], 1.0, frozen, Prices(kl=0.5))
    assert metrics["policy/kl"] == pytest.approx(kl_A.mean().item(), rel=1e-4)
    for b, p, g in zip(before, model.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(b - p.detach(), g, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_c17_c18_a_cut_distribution_is_normalised_again_in_training():
    rl = rl_of("nlpo", top_p=0.6, temperature=0.7)
    model, frozen, _ = setup(rl)
    ragged, action_A = lay_out(EPISODES)
    scores = model.evaluate(ragged, action_A, temperature=0.7, cut=frozen.cut(rl))
    state_A, target_A = ragged.previous[action_A], ragged.ids_N[action_A]
    full, _ = token_logprobs(
        model.policy.hidden(ragged)[state_A], model.policy.output_weight, target_A, temperature=0.7
    )
    for a in range(len(target_A)):
        mask = torch.softmax(frozen.mask.hidden(ragged)[state_A[a]] @ frozen.mask.output_weight.t() / 0.7, -1)
        order, mass, kept = mask.argsort(descending=True), 0.0, set()
        for v in order.tolist():
            if mass >= 0.6:
                break
            kept.add(v)
            mass += float(mask[v])
        kept.add(int(target_A[a]))
        own = torch.softmax(model.policy.hidden(ragged)[state_A[a]] @ model.policy.output_weight.t() / 0.7, -1)
        left = float(own[sorted(kept)].sum())
        assert scores.logp_A[a].item() == pytest.approx(full[a].item() - torch.tensor(left).log().item(), abs=1e-4)
