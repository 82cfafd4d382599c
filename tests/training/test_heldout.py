"""The task beside the reward on the way: what is compared with the start, and by which rule."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from upslope.config import load_recipe
from upslope.config.metrics import METRICS
from upslope.observe.events import read_events
from upslope.text.prepare import Prompt
from upslope.training import heldout
from upslope.training.alarms import judged_worse
from upslope.training.episode import Episode
from upslope.training.heldout import MetricSource, TaskMetrics, Watched, changes, watch_task
from upslope.training.run import Run
from upslope.training.scoring import Scorer

LABELS = ["fish", "bird"]
RIGHT = [LABELS[n % 2] for n in range(40)]


def named(name):
    return MetricSource(name, METRICS[name].source)


def told(recipe, folder, monkeypatch, answers, *, metrics, rewards, references=RIGHT):
    """The alarms of rollouts 0, 1, ... that gave these answers; the state is written and read before each of them."""
    recipe |= {"task": {"prompt": "{text}", "reference": "label", "metrics": metrics}}
    del recipe["reward"]
    recipe["data"] = {"rows": "given", "valid": 0.2, "test": 0.2}
    recipe["rl"]["reward"], recipe["eval"]["every"] = rewards, 1
    run = Run(load_recipe(recipe), folder, plain=True)
    prompts = [Prompt([1], "p", {"reference": label}) for label in references]
    watched = Watched(prompts, TaskMetrics(metrics, named), None, None)
    scorer = Scorer([named(name) for name in rewards], list(rewards.values()), 1.0)
    state = SimpleNamespace(stage="rl", rollout=0, extra={})
    for texts in answers:
        episodes = [Episode("p", text, [1, 2], [1], [0.0], "eos", 0, n, 0) for n, text in enumerate(texts)]
        monkeypatch.setattr(heldout, "generate", lambda *args, episodes=episodes, **options: episodes)
        state.extra = json.loads(json.dumps(state.extra))
        watch_task(run, watched, state, len(answers), lambda: None, scorer)
        state.rollout += 1
    run.close()
    events = read_events(folder / "events.jsonl")
    return [(e["step"], e["message"]) for e in events if e["kind"] == "alarm"]


def test_the_same_prompts_are_compared():
    n = 40
    start = {"scores": {"reward": [0.1] * n, "task: chrf": [0.5] * n}, "sets": {}}
    now = {"scores": {"reward": [0.4] * n, "task: chrf": [0.2] * (n - 1) + [None]}, "sets": {}}
    found = changes(start, now, 0)
    assert "task: chrf -0.30 [-0.30, -0.30] has fallen" in judged_worse(found, {"task: chrf": 1})
    now["scores"]["task: chrf"] = [None] * n
    assert np.isnan(changes(start, now, 0)["task: chrf"].value)


def test_a_metric_of_the_whole_set_that_falls_is_told(recipe, tmp_path, monkeypatch):
    """All are said to be fish: more answers are right than before, and the other label is never found."""
    references = ["fish"] * 30 + ["bird"] * 10
    start = ["fish"] * 6 + ["?"] * 24 + ["bird"] * 10
    shape = {"metrics": ["accuracy", "macro_f1"], "rewards": {"accuracy": 1.0}, "references": references}
    found = told(recipe, tmp_path / "run", monkeypatch, [start, start, ["fish"] * 40], **shape)
    assert [step for step, _ in found] == [2]
    assert "reward 0.35 [" in found[0][1] and "while task: macro_f1 -0.24 [" in found[0][1]


def test_the_number_of_the_set_is_compared_where_the_mean_of_scores_is_another(recipe, tmp_path, monkeypatch):
    """The short answers become right and the long ones empty: the mean of TER falls, the errors of all words rise."""
    long = " ".join(f"w{n}" for n in range(50))
    references = ["fish"] * 30 + [long] * 10
    answers = [["bird"] * 30 + [long] * 10, ["fish"] * 30 + [""] * 10]
    shape = {"metrics": ["ter"], "rewards": {"exact_match": 1.0}, "references": references}
    found = told(recipe, tmp_path / "run", monkeypatch, answers, **shape)
    assert "while task: ter 0.89 [" in found[0][1] and "become worse" in found[0][1]


def test_the_recorded_interval_of_a_set_stands_around_its_value(recipe, tmp_path, monkeypatch):
    """Texts drawn again have fewer different words, and the interval is no lower for that."""
    answers = [[f"{text} {n}" for n, text in enumerate(RIGHT)]]
    told(recipe, tmp_path / "run", monkeypatch, answers, metrics=["distinct_1"], rewards={"accuracy": 1.0})
    found = read_events(tmp_path / "run" / "events.jsonl")[-1]["metrics"]
    assert found["task/distinct_1_low"] < found["task/distinct_1"] == 42 / 80 < found["task/distinct_1_high"]


def test_a_part_of_the_reward_that_falls_while_the_sum_rises_is_told(recipe, tmp_path, monkeypatch):
    """Half were right and half nothing; then all are nearly right."""
    answers = [[text if n % 4 < 2 else "" for n, text in enumerate(RIGHT)], [text + "s" for text in RIGHT]]
    rewards = {"accuracy": 0.1, "edit_similarity": 1.0}
    found = told(recipe, tmp_path / "run", monkeypatch, answers, metrics=["accuracy"], rewards=rewards)
    assert [step for step, _ in found] == [1]
    assert "reward 0." in found[0][1] and "task: accuracy -0.50" in found[0][1]
    assert "reward: accuracy -0.50" in found[0][1] and "edit_similarity" not in found[0][1]


def test_a_sum_that_falls_with_its_part_is_no_alarm(recipe, tmp_path, monkeypatch):
    answers = [[text if n % 4 < 2 else "" for n, text in enumerate(RIGHT)], [text + "s" for text in RIGHT]]
    rewards = {"accuracy": 5.0, "edit_similarity": 1.0}
    assert told(recipe, tmp_path / "run", monkeypatch, answers, metrics=["accuracy"], rewards=rewards) == []


@pytest.mark.parametrize(("weight", "alarms"), [(1.0, 1), (0.0, 0)])
def test_less_of_ter_is_better(recipe, tmp_path, monkeypatch, weight, alarms):
    """Longer answers, ten wrong words each: paid for their length, TER rises; paid for nothing, nothing has risen."""
    answers = [RIGHT, [text + " x" * 10 for text in RIGHT]]
    rewards = {"length_words": weight, "distinct_words": 0.0}
    found = told(recipe, tmp_path / "run", monkeypatch, answers, metrics=["ter"], rewards=rewards)
    assert len(found) == alarms
    assert not found or "task: ter 10.00 [10.00, 10.00]" in found[0][1]
