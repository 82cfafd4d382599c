"""Numbers that are none, planted where nothing is read, reach no loss, no gradient, no metric and no other sequence."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import tiny_decoder
from tests.training.test_objective import rl_of
from tests.training.test_rollout import Fixed, episode
from upslope.config import PRESETS, Optim, Preference, Supervised
from upslope.config import RewardModel as RewardConfig
from upslope.engine import Engine, Request, Sampling
from upslope.models.decoder import Decoder
from upslope.models.heads import ActorCritic, RewardModel
from upslope.models.runner import DecoderRunner
from upslope.ragged import Ragged
from upslope.text.examples import Example, Pair
from upslope.training import rl as rl_module
from upslope.training.controllers import Controllers
from upslope.training.pairs import PolicyLearner, RewardLearner
from upslope.training.preference import pair_step
from upslope.training.rl import Actors, improve, next_rollout
from upslope.training.rollout import Frozen
from upslope.training.run import Run
from upslope.training.scoring import Scorer
from upslope.training.state import RunState
from upslope.training.supervised import supervised_step

NAN = float("nan")
SAID = 20  # token ids from here on were said by others: prompts and what stands between actions
GOOD = [
    episode([23, 21], [4, 1, 25, 5], group=0, total=1.0, between=(2,)),
    episode([23, 21], [9, 2], group=0, sample=1, total=-1.0, finish="length"),
    episode([26], [5, 3, 5, 8], group=1, total=0.5),
    episode([26], [3, 29], group=1, sample=1, total=2.0, between=(1,)),
]


class FakeRun:
    class recipe:
        seed = 0

    @staticmethod
    def should_stop():
        return False

    @staticmethod
    def progress(*details):
        pass

    record = progress


def read_by_all(batch):
    """The states in which the tokens below SAID were chosen."""
    chosen = batch.previous[(batch.ids_N < SAID) & (batch.previous >= 0)]
    return chosen


@pytest.fixture
def plant(monkeypatch):
    """plant(read): from now on a decoder's state is nan at every place but those that read(batch) names."""
    inner = Decoder.hidden
    planted = []

    def start(read):
        def hidden(self, batch):
            keep_N = torch.zeros(batch.tokens, dtype=torch.bool)
            keep_N[read(batch)] = True
            planted.append(int((~keep_N).sum()))
            return torch.where(keep_N[:, None], inner(self, batch), NAN)

        monkeypatch.setattr(Decoder, "hidden", hidden)
        return planted

    return start


def rollout(rl, episodes, monkeypatch):
    """One rollout of given episodes, learned from: the model afterwards and the metrics."""
    torch.manual_seed(0)
    model = ActorCritic(tiny_decoder(), rl.critic, None)
    if model.value_head is not None:
        torch.nn.init.normal_(model.value_head.weight, std=0.3)
    frozen = Frozen(tiny_decoder(9) if rl.uses_reference else None, tiny_decoder(7) if rl.mask_every else None)
    monkeypatch.setattr(rl_module, "load_engine", lambda *details: None)
    monkeypatch.setattr(rl_module, "collect", lambda *details, **options: ([*episodes], 2))
    actors = Actors(model, frozen, None, None, None)
    trained = list(model.parameters() if rl.update == "gradient" else model.critic_parameters())
    state = RunState("rl", model, torch.optim.SGD(trained, lr=0.1))
    controllers = Controllers(rl)
    _, batch, metrics = next_rollout(FakeRun, rl, actors, [], state, controllers)
    metrics |= improve(FakeRun, rl, actors, state, controllers, batch)
    return model, {name: value for name, value in metrics.items() if not name.startswith("time/")}


def assert_equal(one, other):
    """Two rollouts led to the same numbers, and somewhere."""
    (model, metrics), (twin, others) = one, other
    assert metrics == others
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start_of(model), strict=True))


def start_of(model):
    torch.manual_seed(0)
    twin = ActorCritic(tiny_decoder(), model.kind, None)
    if twin.value_head is not None:
        torch.nn.init.normal_(twin.value_head.weight, std=0.3)
    return list(twin.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_states_that_choose_no_action_reach_nothing(name, monkeypatch, plant):
    rl = rl_of(name)
    clean = rollout(rl, GOOD, monkeypatch)
    planted = plant(read_by_all)
    assert_equal(clean, rollout(rl, GOOD, monkeypatch))
    assert planted and min(planted) > 0


@pytest.mark.parametrize("critic", ["shared", "detached"])
def test_only_the_state_behind_a_cut_is_read_besides(critic, monkeypatch, plant):
    rl = rl_of("ppo", limit="bootstrap", critic=critic, entropy_weight=0.1, kl_target=3.0)
    clean = rollout(rl, GOOD, monkeypatch)
    cut = GOOD[1].ids[-1]
    plant(lambda batch: torch.cat((read_by_all(batch), torch.nonzero(batch.ids_N == cut).squeeze(1))))
    assert_equal(clean, rollout(rl, GOOD, monkeypatch))


def broken(e, **changes):
    return dataclasses.replace(e, logp=[NAN] * len(e.logp), rewards={"r": NAN}, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_failed_episodes_reach_nothing_but_their_count(name, monkeypatch):
    rl = rl_of(name)
    failed = [
        broken(episode([21], [7, 6], group=2 + n // 2, sample=n % 2), total=None, failure="r: broke") for n in range(4)
    ]
    clean = rollout(rl, GOOD, monkeypatch)
    model, metrics = rollout(rl, [failed[0], *GOOD[:2], *failed[1:3], *GOOD[2:], failed[3]], monkeypatch)
    assert metrics.pop("reward/failed") == 0.5 and clean[1].pop("reward/failed") == 0.0
    assert metrics.pop("tokens/sampled") == clean[1].pop("tokens/sampled") + 8
    assert_equal(clean, (model, metrics))


@pytest.mark.parametrize("name", PRESETS)
def test_groups_set_aside_reach_nothing_but_what_tells_of_all_that_was_scored(name, monkeypatch):
    """Their scores are in the means of rewards and lengths, which are over every scored episode; nothing else is."""
    rl = rl_of(name)
    aside = [
        dataclasses.replace(episode([21], [7, 6], group=2, sample=n, total=0.5), logp=[NAN, NAN], used=False)
        for n in range(2)
    ]
    clean = rollout(rl, GOOD, monkeypatch)
    model, metrics = rollout(rl, [*aside, *GOOD], monkeypatch)
    scored = [name for name in metrics if name.startswith(("reward/", "length/")) or name == "tokens/sampled"]
    assert metrics["reward/mean"] == pytest.approx(3.5 / 6) and metrics["reward/equal_groups"] == pytest.approx(1 / 3)
    for told in (metrics, clean[1]):
        for metric in scored:
            assert math.isfinite(told.pop(metric))
    assert_equal(clean, (model, metrics))


def test_a_rollout_of_which_nothing_is_learned_has_no_means_of_nothing(monkeypatch):
    rl = rl_of("dapo")
    model, metrics = rollout(rl, [dataclasses.replace(e, used=False) for e in GOOD], monkeypatch)
    assert {name.partition("/")[0] for name in metrics} == {"reward", "length", "tokens", "episodes", "optim"}
    assert metrics["optim/updates"] == metrics["episodes/learned"] == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start_of(model), strict=True))


@pytest.mark.parametrize("trained", [[False, False, True, True, True], [True] * 5])
def test_states_that_predict_nothing_learned_reach_no_maximum_likelihood(trained, plant):
    def step():
        model = tiny_decoder()
        state = RunState("sft", model, torch.optim.SGD(model.parameters(), lr=0.1))
        batch = [Example([21, 22, 3, 4, 5], trained, 0), Example([23, 2, 1], [False, True, True], 1)]
        cfg = Supervised(steps=1, batch=2, optim=Optim(lr=0.1, micro_tokens=6))
        return model, supervised_step(FakeRun, state, cfg, batch)

    model, metrics = step()
    plant(lambda batch: torch.cat([torch.arange(a + (b - a == 5 and not trained[1]), b - 1) for a, b in bounds(batch)]))
    twin, others = step()
    assert metrics == others and math.isfinite(metrics["loss/total"])
    assert metrics["tokens/trained"] == 2 + (4 if trained[1] else 3)  # a first token is predicted by nothing
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def bounds(batch):
    return list(zip(batch.starts, batch.starts[1:], strict=False))


def test_the_loss_of_maximum_likelihood_is_a_mean_over_what_is_predicted():
    model = tiny_decoder()
    state = RunState("sft", model, torch.optim.SGD(model.parameters(), lr=0.0))
    ids = [3, 1, 4, 1, 5]
    logp_NV = torch.log_softmax(model.hidden(Ragged.of([ids])) @ model.output_weight.t(), -1).detach()
    by_hand = -float(torch.stack([logp_NV[n, ids[n + 1]] for n in range(4)]).mean())
    metrics = supervised_step(FakeRun, state, Supervised(steps=1, batch=1), [Example(ids, [True] * 5, 0)])
    assert metrics["loss/total"] == pytest.approx(by_hand, rel=1e-5)


PAIRS = [Pair([21, 22, 3, 4], [21, 22, 5], 2), Pair([23, 6, 7], [23, 8, 9], 1)]


@pytest.mark.parametrize("loss", ["simpo", "orpo", "dpo", "ipo"])
def test_states_that_predict_no_side_reach_no_preference_loss(loss, plant):
    def step():
        model = tiny_decoder()
        learner = PolicyLearner(model, Preference(loss=loss, steps=1, batch=2))
        return learner_step(learner, Preference(loss=loss, steps=1, batch=2))

    check_pairs(step, plant, read_by_all)


def test_states_before_the_last_token_reach_no_reward_model(plant):
    def step():
        torch.manual_seed(0)
        model = RewardModel(tiny_decoder())
        torch.nn.init.normal_(model.head.weight, std=0.3)
        return learner_step(RewardLearner(model), RewardConfig(steps=1, batch=2))

    check_pairs(step, plant, lambda batch: batch.last)


def learner_step(learner, cfg):
    state = RunState(learner.stage, learner.model, torch.optim.SGD(learner.model.parameters(), lr=0.1))
    return learner.model, pair_step(FakeRun, state, cfg, learner, PAIRS, [0, 1])


def check_pairs(step, plant, read):
    model, metrics = step()
    planted = plant(read)
    twin, others = step()
    assert metrics == others and all(math.isfinite(value) for value in metrics.values())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert min(planted) > 0


@pytest.mark.parametrize("head_dim", [4, 32])  # torch's operations and the compiled ones
@pytest.mark.parametrize("length", [5, 300])  # the plain product and the fused kernel
@pytest.mark.parametrize("window", [None, 3])
def test_a_sequence_of_nans_does_not_reach_its_neighbours(head_dim, length, window):
    model = tiny_decoder(context=400, sliding_window=window, head_dim=head_dim, scale=2.0)
    with torch.no_grad():
        model.embed.weight[30] = NAN
    good = [[n % 20 for n in range(length)], [4, 5], [6]]
    alone = model.hidden(Ragged.of(good, [-1, -1, 1]))
    among = model.hidden(Ragged.of([[30, 1], *good[:1], [30] * 7, *good[1:]], [-1, -1, 0, -1, 3]))
    assert torch.isnan(among[:2]).all()
    kept = torch.cat((among[2 : 2 + length], among[-3:]))
    assert torch.isfinite(kept).all()
    torch.testing.assert_close(kept, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [4, 32])
def test_what_a_slot_held_does_not_reach_the_next_sequence_in_it(head_dim):
    model = tiny_decoder(scale=4.0, head_dim=head_dim)
    with torch.no_grad():
        model.embed.weight[30] = NAN
    sampling = Sampling(max_tokens=6)
    good = [Request((3, 1, 4), 0, sampling, 2), Request((1,), 1, sampling, 3), Request((5, 9), 2, sampling, 2)]
    bad = [Request((30, *[k % 20 for k in range(9 + 20 * n)]), 7 + n, Sampling(max_tokens=1 + n)) for n in range(3)]

    def sampled(requests, slots):
        engine = Engine(DecoderRunner(model, dtype=torch.float32), eos_id=0, slots=slots, seed=5, valid_vocab=29)
        engine.load(model, version=1)
        found = engine.generate(requests, step=3)
        return {(requests[c.request].key, c.sample): (c.ids, c.logp) for c in found}

    alone = sampled(good, 64)
    for slots in (1, 2, 3):
        among = sampled([bad[0], good[0], bad[1], good[1], bad[2], good[2]], slots)
        for key, (ids, logp) in alone.items():
            assert among[key][0] == ids and among[key][1] == pytest.approx(logp, abs=1e-5)


def test_a_weighted_score_beyond_fp32_is_a_failure():
    episodes = [episode([1], [2], group=g, total=None) for g in range(3)]
    Scorer([Fixed([1.0, 1e38, -1e39])], [2.0], 1.0).score(episodes, [{}] * 3)
    assert [e.total for e in episodes] == [2.0, 2e38, None] and "beyond fp32" in episodes[2].failure
    steps = {0: [(1, 1e39), (2, -1e39)]}
    episodes = [episode([1], [2, 3], group=0, total=None)]
    Scorer([Fixed([0.0], steps)], [1.0], 1.0, lambda ids: ["a"] * len(ids)).score(episodes, [{}])
    assert episodes[0].total is None and "or its steps: beyond fp32" in episodes[0].failure


def test_what_is_no_number_does_not_lead_the_running_baseline():
    controllers = Controllers(rl_of("reinforce", baseline="running"))
    controllers.saw_return(2.0)
    controllers.saw_return(NAN)
    controllers.saw_return(None)
    assert controllers.returns == 2.0


def test_the_closing_record_of_a_stage_is_json_whatever_was_measured(tmp_path):
    kept = SimpleNamespace(stage_folder=lambda stage: tmp_path / stage, log_sizes=lambda: {"events": 1, "episodes": 2})
    Run.mark_done(
        kept, "eval", {"judge: x": {"before": NAN, "after": 1.0}, "valid/loss": math.inf, "time/stage_s": 2.0}
    )
    text = (tmp_path / "eval" / "done.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {
        "metrics": {"judge: x": {"before": None, "after": 1.0}, "valid/loss": None, "time/stage_s": 2.0},
        "logs": {"events": 1, "episodes": 2},
        "nonfinite": ["metrics.judge: x.before", "metrics.valid/loss"],
    }
