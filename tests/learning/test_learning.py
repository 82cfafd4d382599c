"""The small form of `make learning`: every algorithm maximises the bandit, and some learn the rule, on one seed."""

import pytest

from tests.learning.tasks import KINDS, TASKS, VARIANTS, held, learn, learned


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_algorithm_maximises_a_one_token_bandit(variant):
    outcome = learn(variant, TASKS["bandit"], seed=1, steps=30)
    assert learned(variant, TASKS["bandit"], outcome) and held(variant, outcome), outcome


@pytest.mark.parametrize("variant", ["ppo", "reinforce", "grpo"])
def test_a_short_rule_is_learned_from_sparse_reward(variant):
    outcome = learn(variant, TASKS["rule"], seed=1, steps=60)
    assert learned(variant, TASKS["rule"], outcome) and held(variant, outcome), outcome


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "decoder"])
@pytest.mark.parametrize(
    ("variant", "task", "steps"), [("ppo", "bandit", 30), ("trpo", "bandit", 26), ("grpo", "rule", 60)]
)
def test_every_model_kind_learns(kind, variant, task, steps):
    outcome = learn(variant, TASKS[task], seed=1, steps=steps, kind=kind)
    assert learned(variant, TASKS[task], outcome) and held(variant, outcome), outcome


def test_a_policy_that_knows_nothing_is_paid_little():
    assert learn("reinforce", TASKS["rule"], seed=1, steps=1).reward < 0.15
    assert learn("reinforce", TASKS["bandit"], seed=1, steps=1).reward < 0.6
