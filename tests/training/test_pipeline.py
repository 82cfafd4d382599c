"""Whole runs of a tiny model: what comes out, and that a run stopped anywhere ends where an unbroken one ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import upslope
from tests import scores
from tests.conftest import make_recipe, tiny_decoder
from tests.scores import count_vowels
from upslope.errors import DataError, Interrupted, ModelError, RecipeError, RewardError, RunError
from upslope.models.hf import save_decoder
from upslope.observe.events import read_events
from upslope.training import rl as rl_module
from upslope.training import supervised
from upslope.training.run import Run


def outcome(folder: Path):
    """Everything that a run decides: weights, and metrics without the times and the memory."""
    weights = {p.parent.parent.name: load_file(p) for p in sorted(folder.glob("*/model/model.safetensors"))}
    events = []
    for event in read_events(folder / "events.jsonl"):
        if event["kind"] == "checkpoint":  # when one is due is a matter of time
            continue
        event.pop("seconds", None)
        metrics = event.get("metrics", {})
        event["metrics"] = {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/"))}
        events.append(event)
    episodes = read_events(folder / "episodes.jsonl") if (folder / "episodes.jsonl").exists() else []
    return weights, events, episodes


def same(a, b):
    (weights, events, episodes), (others, other_events, other_episodes) = a, b
    assert weights.keys() == others.keys()
    for stage in weights:
        for name, tensor in weights[stage].items():
            assert torch.equal(tensor, others[stage][name]), f"{stage} {name}"
    assert episodes == other_episodes
    assert events == other_events


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, model_dir, rows):
    recipe = make_recipe(model_dir)
    folder = upslope.train(recipe, rows=rows, out=tmp_path_factory.mktemp("runs") / "unbroken", plain=True)
    return recipe, folder, outcome(folder)


def test_three_stages_a_table_and_a_report(unbroken):
    _, folder, (weights, events, episodes) = unbroken
    assert set(weights) == {"sft", "reward", "rl"}
    assert len([e for e in events if e["kind"] == "step"]) == 3 + 3 + 3
    assert len(episodes) == 18 and all(e["total"] is not None for e in episodes)
    table = next(e for e in events if e["kind"] == "table" and e["stage"] == "eval")
    names = [row[0] for row in table["rows"]]
    assert names[:2] == ["reward: learned", "judge: vader"] and "perplexity, original model" in names
    assert (folder / "report.html").stat().st_size > 50_000
    assert not list(folder.glob("*/checkpoints"))


def test_each_checkpoint_tells_its_time_and_its_size(unbroken):
    saves = [e for e in read_events(unbroken[1] / "events.jsonl") if e["kind"] == "checkpoint"]
    assert [(e["stage"], e["step"]) for e in saves] == [(s, n) for s in ("sft", "reward") for n in (1, 2, 3)] + [
        ("rl", n) for n in (6, 12, 18)
    ]
    weights = (unbroken[1] / "rl" / "model" / "model.safetensors").stat().st_size
    assert all(0 < e["seconds"] < 60 and e["bytes"] > 2.5 * weights for e in saves)  # Adam's two moments beside them


def test_c16_first_minibatch_ratios_of_a_real_run_are_one(unbroken):
    steps = [e for e in unbroken[2][1] if e["kind"] == "step" and e["stage"] == "rl"]
    assert all(s["metrics"]["policy/first_ratio_gap"] < 1e-4 for s in steps)
    assert all(s["metrics"]["policy/sampler_gap_max"] < 1e-4 for s in steps)


def test_c57_the_same_seed_gives_the_same_run_and_another_seed_another(unbroken, rows, tmp_path):
    recipe, _, first = unbroken
    same(outcome(upslope.train(recipe, rows=rows, out=tmp_path / "again", plain=True)), first)
    other = outcome(upslope.train(recipe, "seed=4", rows=rows, out=tmp_path / "other", plain=True))
    assert [e["completion"] for e in other[2]] != [e["completion"] for e in first[2]]


def stop_at_ask(monkeypatch, number):
    """A stop is asked for when a stage looks for one for the `number`-th time, once, the rehearsal left out."""
    asked = 0

    def ask(self):
        nonlocal asked
        began = any(status in ("start", "end") for status in self.terminal.stages.values())
        asked += began
        return began and asked == number

    monkeypatch.setattr(Run, "should_stop", ask)


@pytest.mark.parametrize("stop_at", [1, 4, 7, 9, 12, 17, 23, 29, 34])
def test_c55_a_run_stopped_anywhere_ends_where_an_unbroken_one_ends(unbroken, rows, tmp_path, monkeypatch, stop_at):
    recipe, _, first = unbroken
    stop_at_ask(monkeypatch, stop_at)
    with pytest.raises(Interrupted, match="the same command carries on"):
        upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    monkeypatch.undo()
    same(outcome(upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)), first)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(supervised, "supervised_step", 2), (rl_module, "minibatch_step", 5), (rl_module, "prepare", 2)],
)
def test_c55_a_crash_goes_back_to_the_last_checkpoint_and_repeats(
    unbroken, rows, tmp_path, monkeypatch, module, name, call
):
    recipe, _, first = unbroken
    inner, calls = getattr(module, name), 0

    def crash(*args, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError("made up")
        return inner(*args, **options)

    monkeypatch.setattr(module, name, crash)
    with pytest.raises(MemoryError):
        upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    monkeypatch.undo()
    same(outcome(upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)), first)


def test_c59_a_finished_run_says_so_and_trains_nothing(unbroken, rows, capsys):
    recipe, folder, first = unbroken
    before = (folder / "rl" / "model" / "model.safetensors").stat().st_mtime_ns
    upslope.train(recipe, rows=rows, out=folder, plain=True)
    assert "finished before, nothing to train" in capsys.readouterr().out
    assert (folder / "rl" / "model" / "model.safetensors").stat().st_mtime_ns == before
    same(outcome(folder), first)


def test_a_folder_of_another_run_is_left_alone(unbroken, rows):
    recipe, folder, first = unbroken
    with pytest.raises(RunError, match=r"another recipe: rl\.lam: 0\.95 there, 0\.5 here; choose another folder"):
        upslope.train(recipe, "rl.lam=0.5", rows=rows, out=folder, plain=True)
    same(outcome(folder), first)


def test_a_first_try_that_came_to_nothing_does_not_hold_its_folder(recipe, rows, tmp_path):
    del recipe["reward"], recipe["rl"]
    with pytest.raises(DataError, match="no column"):
        upslope.train(recipe, "data.text=txt", rows=rows, out=tmp_path / "run", plain=True)
    folder = upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)
    assert json.loads((folder / "recipe.json").read_text())["data"]["text"] == "text"
    assert (folder / "sft" / "done.json").is_file()


def test_the_users_own_reward_and_rows(recipe, rows, tmp_path):
    del recipe["reward"], recipe["sft"]
    folder = upslope.train(recipe, "rl.samples=2", reward=count_vowels, rows=rows, out=tmp_path, plain=True)
    episodes = read_events(folder / "episodes.jsonl")
    assert len(episodes) == 36
    for e in episodes:
        assert e["rewards"] == {"count_vowels": count_vowels([], [e["completion"]], [])[0]}
    loaded = upslope.load(folder, dtype="fp32")
    assert len(loaded.generate(["a fine", "a dull"], max_tokens=5, samples=2)) == 4
    assert loaded.generate(["a fine"], temperature=0, max_tokens=9) == loaded.generate(
        ["a fine"], temperature=0, max_tokens=9, seed=3
    )


@pytest.mark.parametrize("critic", ["detached", "separate"])
def test_other_critics_and_bootstrapping_run(recipe, rows, tmp_path, critic):
    del recipe["reward"], recipe["sft"]
    recipe["rl"] |= {"critic": critic, "limit": "bootstrap", "steps": 1, "kl_target": 1.0, "entropy_weight": 0.01}
    folder = upslope.train(recipe, reward=count_vowels, rows=rows, out=tmp_path, plain=True)
    assert (folder / "rl" / "critic.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward": scores.bad_half}, RewardError, "3 of 6 rewards failed, the first with bad_half: returned None"),
        ({"reward": scores.raises}, RewardError, "rl.reward: raises failed on each of the 8 .* KeyError"),
        ({"rows": [{"txt": "a"}]}, DataError, "no column 'text'; did you mean 'txt'"),
        ({"rows": []}, DataError, "there are no rows"),
        ({"model": "nowhere/at/all"}, DataError, "no such file"),
        ({"over": ["data.min_chars=9999"]}, DataError, "no rows left"),
        ({"over": ["rl.max_tokens=63", "data.max_tokens=200"]}, DataError, "exceeds the model's context of 64"),
        ({"over": ["sft.freeze_layers=3"]}, RecipeError, "the model has 2 blocks"),
        ({"over": ["data.max_tokens=3", "rl.max_tokens=2"]}, DataError, "no pairs left"),
    ],
)
def test_bad_input_is_one_line(recipe, rows, tmp_path, changes, error, message):
    if "reward" in changes:
        del recipe["reward"]
        recipe["rl"]["reward"] = "given:here"
    recipe["model"] = changes.get("model", recipe["model"])
    with pytest.raises(error, match=message) as caught:
        upslope.train(
            recipe,
            *changes.get("over", []),
            rows=changes.get("rows", rows),
            reward=changes.get("reward"),
            out=tmp_path / "run",
            plain=True,
        )
    assert "\n" not in str(caught.value)


def test_c43_a_tokenizer_larger_than_the_model_is_refused(recipe, rows, tmp_path, model_dir):
    shutil.copytree(model_dir, tmp_path / "model")
    save_decoder(tiny_decoder(vocab_size=50), tmp_path / "model")
    recipe["model"] = str(tmp_path / "model")
    with pytest.raises(ModelError, match=r"the tokenizer has 2.. tokens, the model .* only 50"):
        upslope.train(recipe, rows=rows, out=tmp_path / "run", plain=True)


def test_ctrl_c_of_the_real_command_saves_and_carries_on(recipe, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe["data"]["rows"] = str(tmp_path / "rows.jsonl")
    recipe["sft"]["steps"] = 400
    del recipe["reward"], recipe["rl"]
    lines = [f"{k} = {json.dumps(v)}" for k, v in recipe.items() if not isinstance(v, dict)]
    for table, content in recipe.items():
        if isinstance(content, dict):
            lines += [f"[{table}]", *(f"{k} = {json.dumps(v)}" for k, v in content.items())]
    (tmp_path / "r.toml").write_text("\n".join(lines))
    command = [sys.executable, "-c", "from upslope.cli import main; main()", "train", str(tmp_path / "r.toml")]
    command += ["-o", str(tmp_path / "run"), "-s", "checkpoint_minutes=10"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = tmp_path / "run" / "events.jsonl"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (events.exists() and events.read_text().count('"step"') > 4):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command carries on" in said and "Traceback" not in said
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "carries on after optimizer step" in done.stdout, done.stderr
    steps = [e["step"] for e in read_events(events) if e["kind"] == "step"]
    assert steps == list(range(1, 401))
