import numpy as np
import pytest
import torch

from tests.conftest import tiny_decoder
from upslope.config import load_recipe
from upslope.errors import RewardError
from upslope.models.heads import ActorCritic
from upslope.rewards.types import RewardOutput
from upslope.training.episode import Episode, lay_out
from upslope.training.objective import Prices, minibatch_step
from upslope.training.rl import minibatch_members
from upslope.training.rollout import Frozen, prepare
from upslope.training.scoring import Scorer
from upslope.training.state import RunState
from upslope.training.update import make_optimizer

BASE = {"model": "m", "data": {"rows": "r", "text": "t", "prompt_words": 2}}


def rl_of(**changes):
    return load_recipe(BASE | {"rl": {"reward": "a:b", "prompts": 4, "minibatches": 2, **changes}}).rl


def episode(prompt, answer, *, group, sample=0, total=1.0, finish="eos", between=()):
    """between: places in the answer that someone else said."""
    actions = [len(prompt) + i for i in range(len(answer)) if i not in between]
    logp = [-1.0] * len(actions)
    return Episode("p", "c", [*prompt, *answer], actions, logp, finish, 0, group, sample, total=total)


EPISODES = [
    episode([3, 1], [4, 1, 5], group=0, total=1.0),
    episode([3, 1], [9, 2], group=0, sample=1, total=-1.0, finish="length"),
    episode([6], [5, 3, 5, 8], group=1, total=0.5),
    episode([9, 7, 9], [3], group=2, total=2.0, finish="length"),
]


def model_of(critic="shared"):
    torch.manual_seed(0)
    model = ActorCritic(tiny_decoder(), critic, tiny_decoder(3) if critic == "separate" else None)
    torch.nn.init.normal_(model.value_head.weight, std=0.3)
    return model


def prepared(model, rl, episodes=EPISODES, kl=0.1):
    return prepare(episodes, model, Frozen(tiny_decoder(9)), rl, kl)[0]


class FakeRun:
    class recipe:
        seed = 0

    @staticmethod
    def should_stop():
        return False


def test_prompts_that_are_shared_are_laid_out_once():
    batch, action_A = lay_out(EPISODES)
    assert batch.tokens == 2 + 3 + 2 + 5 + 4
    ids = batch.ids_N[action_A].tolist()
    assert ids == [t for e in EPISODES for t in e.ids[e.prompt_length :]]
    states = batch.ids_N[batch.previous[action_A]].tolist()
    assert states == [e.ids[a - 1] for e in EPISODES for a in e.actions]


def test_for_a_kind_that_needs_a_source_every_prompt_is_a_parent():
    batch, action_A = lay_out(EPISODES, needs_source=True)
    alone = lay_out(EPISODES)[0].parent.count(-1)
    rows = [b for b, p in enumerate(batch.parent) if p >= 0]
    assert len(rows) == len(EPISODES) and batch.parent.count(-1) == alone
    assert {b for b in batch.parent if b >= 0} == set(range(len(batch))) - set(rows)
    assert batch.ids_N[action_A].tolist() == [t for e in EPISODES for t in e.ids[e.prompt_length :]]
    states = batch.ids_N[batch.previous[action_A]].tolist()
    assert states == [e.ids[a - 1] for e in EPISODES for a in e.actions]


def test_the_rewards_of_a_rollout_by_hand():
    rl = rl_of(gamma=1.0, lam=1.0, scale="none")
    model = model_of()
    batch = prepared(model, rl, kl=0.1)
    kl = 0.1 * (batch.old_logp_A - batch.ref_logp_A)
    for e, member in enumerate(EPISODES):
        rows = batch.rows([e])
        for t, row in enumerate(rows):  # the return is all that is still to come
            expected = member.total - kl[rows[t:]].sum()
            assert batch.return_A[row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_c20_a_cut_completion_gets_its_score_or_the_critics_value_never_both():
    model = model_of()
    paid = prepared(model, rl_of(gamma=1.0, lam=1.0, scale="none", limit="score"), kl=0.0)
    led = prepared(model, rl_of(gamma=1.0, lam=1.0, scale="none", limit="bootstrap"), kl=0.0)
    assert paid.return_A[paid.rows([1])].tolist() == pytest.approx([-1.0, -1.0], abs=1e-5)
    batch, action_A = lay_out([EPISODES[1]])
    value = model.value_after(batch, action_A[-1:]).item()
    assert led.return_A[led.rows([1])].tolist() == pytest.approx([value, value], abs=1e-5)
    assert torch.allclose(paid.return_A[paid.rows([0])], led.return_A[led.rows([0])])


def test_c21_what_others_said_between_actions_is_stepped_over():
    talk = episode([3, 1], [4, 8, 8, 5], group=0, total=1.0, between=(1, 2))
    model = model_of()
    batch = prepared(model, rl_of(gamma=0.5, lam=1.0, scale="none"), [talk], kl=0.0)
    assert len(batch.old_logp_A) == 2
    assert batch.return_A.tolist() == pytest.approx([0.5, 1.0], abs=1e-5)  # time counts actions


@pytest.mark.parametrize("critic", ["shared", "detached", "separate"])
def test_c16_the_ratio_is_one_on_the_first_minibatch(critic):
    rl = rl_of(critic=critic)
    model = model_of(critic)
    batch = prepared(model, rl)
    state = RunState("rl", model, make_optimizer(model, rl.optim))
    metrics = minibatch_step(FakeRun, rl, state, batch, [0, 1, 2, 3], 1e-3, Frozen(), Prices())
    assert metrics["policy/ratio_gap"] < 1e-5 and metrics["policy/clipped"] == 0.0
    again = minibatch_step(FakeRun, rl, state, batch, [0, 1, 2, 3], 1e-3, Frozen(), Prices())
    assert again["policy/ratio_gap"] > 1e-4


@pytest.mark.parametrize("budget", [1, 9, 1000])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_c27_c28_micro_batches_change_no_term_of_the_loss(budget, critic):
    def after(micro_tokens):
        rl = rl_of(critic=critic, entropy_weight=0.01, optim={"lr": 1e-2, "micro_tokens": micro_tokens})
        model = model_of(critic)
        batch = prepared(model, rl_of(critic=critic))
        state = RunState("rl", model, torch.optim.SGD(model.parameters(), lr=0.1))
        metrics = minibatch_step(FakeRun, rl, state, batch, [0, 1, 2, 3], 0.1, Frozen(), Prices())
        return model, metrics

    (one, metrics), (other, cut) = after(10_000), after(budget)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert metrics == pytest.approx(cut, rel=1e-4, abs=1e-6)


def test_c37_every_episode_exactly_once_an_epoch_even_when_some_failed():
    rl = rl_of(prompts=4, samples=2, minibatches=2, epochs=3)
    episodes = [episode([1, 2], [3], group=g, sample=s) for g in range(4) for s in range(2)][:7]
    batch = prepared(model_of(), rl, episodes)
    for epoch in range(3):
        seen = [e for part in range(2) for e in minibatch_members(0, rl, batch, 5, epoch * 2 + part)]
        assert sorted(seen) == list(range(7))
    groups = [{episodes[e].group for e in minibatch_members(0, rl, batch, 5, part)} for part in range(2)]
    assert not groups[0] & groups[1]


class Fixed:
    name = "fixed"

    def __init__(self, scores, steps=None):
        self.scores = scores
        self.steps = steps or {}

    def __call__(self, episodes, rows):
        return RewardOutput(np.array(self.scores), [None if s == s else "broke" for s in self.scores], self.steps)


def test_c54_a_failed_reward_is_no_zero_and_too_many_stop_the_run():
    episodes = [episode([1], [2], group=g) for g in range(4)]
    Scorer([Fixed([1.0, float("nan"), 3.0, 4.0]), Fixed([1.0] * 4)], [1.0, 10.0], 0.5).score(episodes, [{}] * 4)
    assert [e.total for e in episodes] == [11.0, None, 13.0, 14.0]
    assert episodes[1].failure == "fixed: broke"
    episodes = [episode([1], [2], group=g) for g in range(4)]
    with pytest.raises(RewardError, match=r"1 of 4 rewards failed, the first with fixed: broke; .*now 0.2"):
        scorer = Scorer([Fixed([1.0, float("nan"), 3.0, 4.0])], [1.0], 0.2)
        scorer.score(episodes, [{}] * 4)
        scorer.check(episodes)


def test_steps_of_a_reward_stand_at_the_actions_that_finish_them():
    talk = episode([3], [11, 12, 13, 14], group=0, total=None)
    pieces = lambda ids: ["ab" for _ in ids]
    steps = {0: [(1, 0.5), (2, 0.25), (3, 1.0), (99, 2.0)]}
    Scorer([Fixed([3.75], steps), Fixed([1.0])], [2.0, 1.0], 0.0, pieces).score([talk], [{}])
    assert talk.steps == [(0, 1.0), (0, 0.5), (1, 2.0), (3, 4.0)] and talk.total == 8.5
    rl = rl_of(gamma=0.5, lam=1.0, scale="none", reward_norm="running")
    batch, _ = prepare([talk], model_of(), Frozen(), rl, 0.0, score_scale=2.0)
    reward = [1.5 / 2, 2.0 / 2, 0.0, (4.0 + 1.0) / 2]
    expected = [sum(r * 0.5**k for k, r in enumerate(reward[t:])) for t in range(4)]
    assert batch.return_A.tolist() == pytest.approx(expected, abs=1e-5)
