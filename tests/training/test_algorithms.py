"""Every row of the table of algorithms through the real loop: runs, resumes, and the invariances that all must keep."""

import pytest
from safetensors.torch import load_file

import upslope
from tests.conftest import make_recipe
from tests.scores import count_vowels, fails_sometimes
from tests.training.test_pipeline import outcome, same, stop_at_ask
from upslope.config import PRESETS
from upslope.errors import Interrupted


def recipe_of(name, model_dir, **rl):
    recipe = make_recipe(model_dir)
    del recipe["reward"], recipe["sft"]
    base = {"algorithm": name, "steps": 2, "prompts": 4, "max_tokens": 6, "optim": {"lr": 1e-2}}
    recipe["rl"] = base | ({"teacher": str(model_dir)} if name == "gkd" else {"reward": "given:here"}) | rl
    if PRESETS[name].get("samples"):
        recipe["rl"] |= {"samples": 3}
    recipe["eval"]["prompts"] = 2
    return recipe


def train(name, model_dir, rows, out, *overrides, **rl):
    reward = None if name == "gkd" else count_vowels
    return upslope.train(recipe_of(name, model_dir, **rl), *overrides, reward=reward, rows=rows, out=out, plain=True)


@pytest.fixture(scope="module")
def finished(model_dir, rows, tmp_path_factory):
    """One run of each algorithm, made when it is first asked for."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = train(name, model_dir, rows, tmp_path_factory.mktemp("runs") / name)
        return made[name]

    return run


@pytest.mark.parametrize("name", PRESETS)
def test_c16_every_algorithm_starts_from_a_ratio_of_one_and_moves(finished, name, model_dir):
    weights, events, episodes = outcome(finished(name))
    steps = [e["metrics"] for e in events if e["kind"] == "step"]
    assert len(steps) == 2 and episodes
    for metrics in steps:
        assert metrics.get("policy/first_ratio_gap", 0.0) < 1e-4
        assert metrics["policy/sampler_gap_max"] < 1e-4
        assert metrics["optim/skipped"] == 0
    start = load_file(model_dir / "model.safetensors")
    moved = [n for n, w in weights["rl"].items() if not bool((w == start[n]).all())]
    assert moved


@pytest.mark.parametrize("stop_at", [2, 12, 16])
@pytest.mark.parametrize("name", PRESETS)
def test_c55_every_algorithm_stopped_anywhere_ends_where_an_unbroken_run_ends(
    finished, model_dir, rows, tmp_path, monkeypatch, name, stop_at
):
    stop_at_ask(monkeypatch, stop_at)
    with pytest.raises(Interrupted):
        train(name, model_dir, rows, tmp_path / "run")
    monkeypatch.undo()
    same(outcome(train(name, model_dir, rows, tmp_path / "run")), outcome(finished(name)))


@pytest.mark.parametrize("name", ["rloo", "grpo", "dapo", "raft", "reinforce"])
def test_c54_failed_rewards_cost_their_episodes_and_no_run(name, model_dir, rows, tmp_path):
    recipe = recipe_of(name, model_dir) | {"limits": {"max_failures": 0.9}}
    folder = upslope.train(recipe, reward=fails_sometimes, rows=rows, out=tmp_path / "run", plain=True)
    _, events, episodes = outcome(folder)
    failed = [e for e in episodes if e["failure"]]
    assert failed and all(e["total"] is None for e in failed) and len(failed) < len(episodes)
    steps = [e["metrics"] for e in events if e["kind"] == "step"]
    assert sum(m["reward/failed"] for m in steps) > 0
    assert sum(m["episodes/learned"] for m in steps) <= len(episodes) - len(failed)


def test_ppo_kl_leads_its_penalty_by_what_the_steps_led_to(model_dir, rows, tmp_path):
    folder = train("ppo-kl", model_dir, rows, tmp_path / "run", "rl.steps=4", "rl.trust.target=1e-6")
    steps = [e["metrics"] for e in outcome(folder)[1] if e["kind"] == "step"]
    assert [m["trust/coefficient"] for m in steps] == [1.0, 2.0, 4.0, 8.0]
    assert all(m["policy/drift"] > 1e-5 for m in steps)
