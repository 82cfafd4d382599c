import pytest
import torch

from tests.conftest import tiny_decoder
from upslope.algo import token_logprobs
from upslope.errors import ModelError
from upslope.models.heads import ActorCritic, RewardModel
from upslope.ragged import Ragged

BATCH = Ragged.of([[1, 2, 3, 4], [5, 6]])
ACTIONS = torch.tensor([2, 3, 5])


def make(critic):
    trunk = tiny_decoder(1) if critic == "separate" else None
    model = ActorCritic(tiny_decoder(), critic, trunk)
    if model.value_head is not None:
        torch.nn.init.normal_(model.value_head.weight)
    return model


@pytest.mark.parametrize("critic", ["shared", "detached", "separate"])
def test_c1_values_are_of_the_state_before_the_action(critic):
    model = make(critic)
    scores = model.evaluate(BATCH, ACTIONS)
    trunk = model.critic_trunk or model.policy
    hidden = trunk.hidden(BATCH)
    torch.testing.assert_close(scores.value_A, model.value_head(hidden[torch.tensor([1, 2, 4])]))
    policy = model.policy.hidden(BATCH)[torch.tensor([1, 2, 4])]
    torch.testing.assert_close(
        scores.logp_A, token_logprobs(policy, model.policy.output_weight, BATCH.ids_N[ACTIONS])[0]
    )


@pytest.mark.parametrize(("critic", "reaches"), [("shared", True), ("detached", False), ("separate", False)])
def test_c30_where_the_critics_gradient_goes(critic, reaches):
    model = make(critic)
    model.evaluate(BATCH, ACTIONS).value_A.sum().backward()
    touched = any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.policy.parameters())
    assert touched is reaches
    assert model.value_head.weight.grad.abs().sum() > 0
    if critic == "separate":
        assert any(p.grad is not None for p in model.critic_trunk.parameters())


def test_c40_a_new_critic_says_zero_everywhere():
    model = ActorCritic(tiny_decoder(), "shared")
    assert model.evaluate(BATCH, ACTIONS).value_A.tolist() == [0.0, 0.0, 0.0]


def test_without_a_critic_there_is_no_value():
    model = make("none")
    assert model.evaluate(BATCH, ACTIONS).value_A is None
    with pytest.raises(ModelError, match="no critic"):
        model.value_after(BATCH, ACTIONS)


def test_c20_the_value_after_the_last_token_is_read_there():
    model = make("shared")
    value = model.value_after(BATCH, torch.tensor([3]))
    torch.testing.assert_close(value, model.value_head(model.policy.hidden(BATCH)[3:4]))


def test_an_action_without_a_state_before_it_is_refused():
    with pytest.raises(ValueError, match="first token"):
        make("none").evaluate(BATCH, torch.tensor([4]))


def test_c3_reward_is_read_at_the_last_token_whatever_it_is():
    model = RewardModel(tiny_decoder())
    torch.nn.init.normal_(model.head.weight)
    together = model.score(Ragged.of([[1, 2, 0], [5, 0, 0, 0], [3]]))  # 0 is no pad here: nothing is
    alone = torch.cat([model.score(Ragged.of([s])) for s in ([1, 2, 0], [5, 0, 0, 0], [3])])
    torch.testing.assert_close(together, alone)
    hidden = model.trunk.hidden(Ragged.of([[5, 0, 0, 0]]))
    torch.testing.assert_close(together[1], model.head(hidden[3]))


def test_the_scale_shifts_and_divides_and_cannot_be_zero():
    model = RewardModel(tiny_decoder())
    torch.nn.init.normal_(model.head.weight)
    before = model.score(BATCH)
    model.set_scale(mean=1.0, std=2.0)
    torch.testing.assert_close(model.score(BATCH), (before - 1.0) / 2.0)
    with pytest.raises(ModelError, match="same score"):
        model.set_scale(mean=0.0, std=0.0)


@pytest.mark.parametrize(("critic", "trunk"), [("bogus", False), ("separate", False), ("shared", True)])
def test_critics_that_cannot_be(critic, trunk):
    with pytest.raises(ModelError, match="cannot be"):
        ActorCritic(tiny_decoder(), critic, tiny_decoder() if trunk else None)


def test_a_critic_that_has_learned_nothing_begins_with_the_mean_score_and_one_that_has_keeps_what_it_knows():
    new = ActorCritic(tiny_decoder(), "shared")
    new.begin_values(0.75)
    assert new.evaluate(BATCH, ACTIONS).value_A.tolist() == [0.75, 0.75, 0.75]
    new.begin_values(2.0)
    assert new.value_head.bias.item() == 0.75
    learned = make("detached")
    before = learned.evaluate(BATCH, ACTIONS).value_A
    learned.begin_values(2.0)
    assert torch.equal(learned.evaluate(BATCH, ACTIONS).value_A, before)
    make("none").begin_values(1.0)
