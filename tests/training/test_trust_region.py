"""TRPO's update: the bound is kept, the direction is the natural one, and a rejected step leaves no trace."""

import pytest
import torch

from tests.conftest import tiny_decoder
from tests.training.test_objective import rl_of, setup
from upslope.algo import token_kl
from upslope.models.heads import ActorCritic
from upslope.training.episode import lay_out
from upslope.training.rollout import Frozen, prepare
from upslope.training.trust_region import trust_region_update
from upslope.training.update import StopAsked


def kl_to(model, start, batch):
    ragged, action_A = lay_out(batch.episodes)
    state_A = ragged.previous[action_A]
    with torch.no_grad():
        hidden, old = model.policy.hidden(ragged)[state_A], start.policy.hidden(ragged)[state_A]
        return token_kl(old, start.policy.output_weight, hidden, model.policy.output_weight).mean().item()


@pytest.mark.parametrize("bound", [1e-4, 1e-2, 0.3])
def test_c36_the_kl_keeps_its_bound_and_the_surrogate_rises(bound):
    rl = rl_of("trpo", trust={"max_kl": bound, "damping": 1e-4})
    model, _, batch = setup(rl)
    start, _, _ = setup(rl)
    metrics = trust_region_update(rl, model.policy, batch, lambda: False)
    assert metrics["trust/given_up"] == 0.0 and metrics["trust/gain"] > 0
    assert metrics["trust/kl"] <= bound
    assert kl_to(model, start, batch) == pytest.approx(metrics["trust/kl"], rel=1e-3)
    assert metrics["trust/kl"] > bound / 10  # and the step is not timid


def test_c36_a_step_that_never_helps_is_taken_back_bit_for_bit():
    rl = rl_of("trpo", trust={"max_kl": 1e-2, "backtracks": 3})
    model, _, batch = setup(rl)
    start, _, _ = setup(rl)
    batch.advantage_A = torch.zeros_like(batch.advantage_A)  # nothing to gain anywhere
    metrics = trust_region_update(rl, model.policy, batch, lambda: False)
    assert metrics["trust/given_up"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_a_stop_inside_leaves_the_parameters_as_they_were():
    rl = rl_of("trpo")
    for after in (1, 5, 10, 11):
        model, _, batch = setup(rl)
        start, _, _ = setup(rl)
        asked = iter([False] * after + [True] * 100)
        with pytest.raises(StopAsked):
            trust_region_update(rl, model.policy, batch, lambda asked=asked: next(asked))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)), after


def test_c36_the_step_is_the_natural_gradient_scaled_to_the_bound():
    """Against a dense Fisher matrix, summed from every token's score, on a small model."""
    shape = {"vocab_size": 12, "width": 4, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 4, "ffn_width": 4}
    rl = rl_of("trpo", trust={"max_kl": 1e-6, "damping": 0.05, "cg_steps": 400}, kl=0.0)
    model = ActorCritic(tiny_decoder(scale=6.0, **shape), "detached", None)
    start = ActorCritic(tiny_decoder(scale=6.0, **shape), "detached", None)
    batch, _ = prepare(setup(rl)[2].episodes, model, Frozen(), rl, 0.0)
    parameters = list(start.policy.parameters())
    ragged, action_A = lay_out(batch.episodes)
    state_A, target_A = ragged.previous[action_A], ragged.ids_N[action_A]
    logits_AV = start.policy.hidden(ragged)[state_A] @ start.policy.output_weight.t()
    logp_AV = torch.log_softmax(logits_AV, -1)
    gain = (batch.advantage_A * logp_AV.gather(1, target_A[:, None]).squeeze(1)).mean()
    g = torch.cat([x.flatten() for x in torch.autograd.grad(gain, parameters, retain_graph=True)])
    fisher = torch.zeros(len(g), len(g))
    for a in range(len(target_A)):
        for v in range(12):  # F = mean over states of sum over v of p_v grad log p_v grad log p_v^T
            s = torch.cat([x.flatten() for x in torch.autograd.grad(logp_AV[a, v], parameters, retain_graph=True)])
            fisher += logp_AV[a, v].exp().detach() * torch.outer(s, s) / len(target_A)
    fisher += 0.05 * torch.eye(len(g))
    x = torch.linalg.solve(fisher.double(), g.double())
    expected = x * (2e-6 / (x @ fisher.double() @ x)) ** 0.5
    metrics = trust_region_update(rl, model.policy, batch, lambda: False)
    assert metrics["trust/halvings"] == 0.0
    moved = torch.cat([(b - a).detach().flatten() for a, b in zip(parameters, model.policy.parameters(), strict=True)])
    assert torch.nn.functional.cosine_similarity(moved.double(), expected, dim=0) > 0.9995
    assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=1e-2)
