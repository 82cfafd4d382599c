"""Sweeps: what is planned, and real runs of the real command that fail, are killed, and carry on."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import upslope
from tests.conftest import make_recipe
from upslope.config import load_recipe
from upslope.errors import Interrupted, RecipeError, RunError
from upslope.observe.events import EventLog, read_events
from upslope.training import search as search_module
from upslope.training import sweep as sweep_module
from upslope.training.axes import as_toml, axis_of, combinations, parse_axis, plan, run_name, split_values
from upslope.training.process import Process
from upslope.training.search import choose_metric, data_of, direction_of, propose
from upslope.training.sweep import run_sweep

COMMAND = [sys.executable, "-c", "from upslope.cli import main; main()", "sweep"]


@pytest.fixture
def sft_toml(model_dir, rows, tmp_path):
    """A recipe file with the stage sft alone."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = make_recipe(model_dir)
    del recipe["reward"], recipe["rl"]
    recipe["data"]["rows"] = str(tmp_path / "rows.jsonl")
    lines = [f"{k} = {json.dumps(v)}" for k, v in recipe.items() if not isinstance(v, dict)]
    for table, content in recipe.items():
        if isinstance(content, dict):
            lines += [f"[{table}]", *(f"{k} = {json.dumps(v)}" for k, v in content.items())]
    (tmp_path / "r.toml").write_text("\n".join(lines))
    return tmp_path / "r.toml"


def pretend(monkeypatch, reward_of=lambda recipe: 1.0, fails=lambda recipe: ""):
    """Runs that end at once, in this process, with a made-up reward; returns the names of those that were started."""
    started = []

    def run(self, recipe, folder, reward=None, rows=None):
        started.append(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(recipe))
        log = EventLog(folder / "events.jsonl")
        for step in (1, 2, 3, 4):
            log.write("step", stage="rl", step=step, metrics={"reward/mean": step - 4 + reward_of(recipe)})
        log.close()
        if reason := fails(recipe):
            return reason
        for stage in ("sft", "reward", "rl", "eval"):
            (folder / stage).mkdir(exist_ok=True)
            (folder / stage / "done.json").write_text('{"metrics": {}}')
        return ""

    monkeypatch.setattr(Process, "run", run)
    monkeypatch.setattr(sweep_module, "begin_from", lambda others, folder, table: "")
    return started


def test_values_are_split_at_commas_outside_brackets_and_quotes():
    assert split_values("0.9,0.95") == ["0.9", "0.95"]
    assert split_values('["a,b","c"],[]') == ['["a,b","c"]', "[]"]
    assert split_values("'x,y',z") == ["'x,y'", "z"]
    assert split_values(r'"a\",b",c') == [r'"a\",b"', "c"]
    assert split_values('{"a:f" = 1, "b:f" = 2},x') == ['{"a:f" = 1, "b:f" = 2}', "x"]


def test_ranges_are_read():
    axis = parse_axis("optim.lr=log:1e-6..1e-4")
    assert (axis.range.low, axis.range.high, axis.range.log, axis.range.whole) == (1e-6, 1e-4, True, False)
    assert axis.range.text(3.14159e-5) == "3.142e-05" and axis.range.text(1.00001e-6) == "1e-06"
    assert parse_axis("rl.epochs=1..4").range.text(3) == "3"
    assert parse_axis("rl.lam=0..1.0").range.high == 1.0
    assert parse_axis("rl.lam=0.333333..0.9").range.text(0.33333301) == "0.333333"  # rounding does not leave the range
    assert parse_axis("model=../a..b").range is None


def test_the_plan_is_the_product_of_values_and_seeds(recipe):
    axes = [parse_axis("rl.lam=0.9,1"), parse_axis("optim.lr=1e-3,1e-4")]
    planned = plan(recipe, ["rl.kl=0.1"], combinations(axes), 2)
    assert [p.name for p in planned[:4]] == [
        *("lam=0.9,lr=0.001,seed=3", "lam=0.9,lr=0.0001,seed=3"),
        *("lam=1.0,lr=0.001,seed=3", "lam=1.0,lr=0.0001,seed=3"),
    ]
    assert len(planned) == 8 and [p.recipe.seed for p in planned] == [3] * 4 + [4] * 4
    last = planned[-1].recipe
    assert (last.rl.lam, last.rl.optim.lr, last.rl.kl, last.sft.optim.lr) == (1.0, 1e-4, 0.1, 1e-4)


def test_names_are_readable_and_fit_a_file_system(recipe):
    resolved = load_recipe(recipe, ['rl.stop=["a/b", "c"]', "rl.optim.lr=1e-5"])
    assert run_name(resolved, ["rl.optim.lr", "sft.optim.lr"]) == "rl.optim.lr=1e-05,sft.optim.lr=0.001,seed=3"
    name = run_name(resolved, ["rl.stop"])
    assert "/" not in name and name.startswith("stop=[_a_b_c_]-") and name.endswith(",seed=3")
    assert len(run_name(load_recipe(recipe, ["name=" + "x" * 300]), ["name"])) < 80


def test_values_from_python_are_written_as_toml(recipe):
    for value in (0.95, 3, True, "a,b", ["a,b"], {"m:f": 0.5}):
        axis = axis_of("rl.reward", [value, "other"])
        assert len(axis.texts) == 2 and axis.texts[0] == as_toml(value)
    planned = plan(recipe, [], combinations([axis_of("rl.reward", [{"m:f": 0.5}, "m:g"])]), 1)
    assert [p.recipe.rl.rewards for p in planned] == [{"m:f": 0.5}, {"m:g": 1.0}]
    assert axis_of("rl.stop", [["a,b"]]).texts == ('["a,b"]',)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["rl.lamda=1,2"], {}, "unknown key 'rl.lamda'; did you mean 'rl.lam'?"),
        (["rl.lam=0.9,2"], {}, "rl.lam = 2; input should be less than or equal to 1"),
        (["rl.lam=0.9,,1"], {}, "'rl.lam=0.9,,1' has an empty value"),
        (["rl.lam"], {}, "'rl.lam' has no values"),
        (["rl.lam=1,1.0"], {}, "two values of the sweep mean the same: lam=1.0,seed=3"),
        (["rl.lam=1,1"], {}, "lists 1 twice"),
        (["rl.lam=1", "rl.lam=2"], {}, "names rl.lam twice"),
        (["seed=1,2"], {}, "use --seeds 3"),
        (["rl.lam=0.1..0.9"], {}, "rl.lam is a range; list its values, or search it with --search 20"),
        (["rl.lam=0.9..0.1"], {"search": 2}, "is empty; write low..high"),
        (["rl.lam=0.5..1.5"], {"search": 2}, "rl.lam = 1.5; input should be less"),
        (["rl.lam=0.9,1"], {"metric": "reward/mean"}, "add --search 20"),
        (["rl.lam=0.9,1"], {"search": 2, "metric": "reward: learned"}, "tuning may not look at the test side"),
        (["rl.reward=m:f,m:g"], {"search": 2}, "changes what reward/mean means"),
        ([], {}, "a sweep needs a key"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(recipe, tmp_path, monkeypatch, values, options, message):
    started = pretend(monkeypatch)
    with pytest.raises(RecipeError) as caught:
        run_sweep(recipe, [parse_axis(v) for v in values], [], seeds=1, out=tmp_path / "s", **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert started == [] and not list((tmp_path / "s").glob("*/recipe.json"))


def test_a_failed_run_stops_no_other_and_is_tried_again(recipe, tmp_path, monkeypatch, capsys):
    axes = [parse_axis("rl.lam=0.5,0.9")]
    pretend(monkeypatch, fails=lambda r: "no luck" if r["rl"]["lam"] == 0.5 else "")
    with pytest.raises(RunError, match=r"2 of the runs failed: lam=0.5,seed=3: no luck \(and lam=0.5,seed=4\)"):
        run_sweep(recipe, axes, [], seeds=2, out=tmp_path / "s", plain=True)
    said = capsys.readouterr().out
    assert "2 values of rl.lam x 2 seeds = 4 runs" in said and "lam=0.5,seed=3 failed: no luck" in said
    assert said.index("= 4 runs") < said.index("run 1 of 4")
    runs = json.loads((tmp_path / "s" / "sweep.json").read_text())["runs"]
    assert runs["lam=0.5,seed=4"] == {"status": "failed", "reason": "no luck"}
    assert "failed: lam=0.5,seed=4: no luck" in (tmp_path / "s" / "compare.md").read_text()
    started = pretend(monkeypatch)
    assert run_sweep(recipe, axes, [], seeds=3, out=tmp_path / "s", plain=True) == tmp_path / "s"
    assert started == ["lam=0.5,seed=3", "lam=0.5,seed=4", "lam=0.5,seed=5", "lam=0.9,seed=5"]
    before = (tmp_path / "s" / "compare.md").read_bytes(), (tmp_path / "s" / "compare.png").read_bytes()
    assert "2 values of rl.lam x 3 seeds = 6 runs" in capsys.readouterr().out
    run_sweep(recipe, axes, [], seeds=3, out=tmp_path / "s", plain=True)
    assert "6 finished before" in capsys.readouterr().out and len(started) == 4
    assert before == ((tmp_path / "s" / "compare.md").read_bytes(), (tmp_path / "s" / "compare.png").read_bytes())


def test_a_folder_of_other_runs_is_left_alone(recipe, tmp_path, monkeypatch):
    axes = [parse_axis("rl.lam=0.5,0.9")]
    pretend(monkeypatch)
    run_sweep(recipe, axes, [], seeds=1, out=tmp_path / "s", plain=True)
    with pytest.raises(RunError, match=r"holds a run of another recipe: rl.kl: 0.05 there, 0.2 here"):
        run_sweep(recipe, axes, ["rl.kl=0.2"], seeds=1, out=tmp_path / "s", plain=True)
    with pytest.raises(RunError, match="holds a single run"):
        run_sweep(recipe, axes, [], seeds=1, out=tmp_path / "s" / "lam=0.5,seed=3", plain=True)
    with (tmp_path / "s" / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="a sweep is at work"):
            run_sweep(recipe, axes, [], seeds=1, out=tmp_path / "s", plain=True)


def test_a_search_is_the_same_again_and_carries_on_from_its_own_file(recipe, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    axes = [parse_axis("rl.lam=0.0..1.0"), parse_axis("rl.epochs=1,2")]
    reward = lambda r: -((r["rl"]["lam"] - 0.3) ** 2)
    pretend(monkeypatch, reward)
    run_sweep(recipe, axes, [], seeds=1, search=9, out=tmp_path / "whole", plain=True)
    whole = json.loads((tmp_path / "whole" / "sweep.json").read_text())["search"]
    assert whole["metric"] == "reward/mean" and "on training data" in whole["data"]
    for trial in whole["trials"]:  # the last of four rollouts is the last quarter
        assert trial["objective"] == pytest.approx(-((float(trial["setting"]["rl.lam"]) - 0.3) ** 2))

    class Stop(Exception):
        pass

    started = pretend(monkeypatch, reward)
    inner = Process.run
    monkeypatch.setattr(
        Process, "run", lambda *a, **k: inner(*a, **k) if len(started) < 6 else (_ for _ in ()).throw(Stop)
    )
    with pytest.raises(Stop):
        run_sweep(recipe, axes, [], seeds=1, search=9, out=tmp_path / "cut", plain=True)
    started = pretend(monkeypatch, reward)
    run_sweep(recipe, axes, [], seeds=1, search=9, out=tmp_path / "cut", plain=True)
    assert json.loads((tmp_path / "cut" / "sweep.json").read_text())["search"] == whole
    assert len(started) <= 3
    first = (tmp_path / "whole" / "compare.md").read_text().splitlines()[2]
    best = max(whole["trials"], key=lambda t: t["objective"])["setting"]["rl.lam"]
    assert best in first  # the best trial stands first
    with pytest.raises(RunError, match="holds a search over other values"):
        run_sweep(recipe, [parse_axis("rl.lam=0.1..1.0")], [], seeds=1, search=2, out=tmp_path / "cut", plain=True)
    with pytest.raises(RecipeError, match=r"no metric 'reward/men' was recorded in .*; name one such as reward/mean"):
        run_sweep(recipe, axes, [], seeds=1, search=2, metric="reward/men", out=tmp_path / "whole", plain=True)


def test_a_combination_that_cannot_be_is_a_failed_trial(recipe, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    pretend(monkeypatch)
    axes = [parse_axis("rl.prompts=6,8"), parse_axis("rl.minibatches=3,2")]  # 8 prompts do not divide into 3
    axes[1] = parse_axis("rl.minibatches=2,3")
    with pytest.raises(RunError, match=r"failed: trial \d+: recipe: rl: 8 prompts .* do not divide into 3 minibatches"):
        run_sweep(recipe, axes, [], seeds=1, search=12, out=tmp_path / "s", plain=True)
    trials = json.loads((tmp_path / "s" / "sweep.json").read_text())["search"]["trials"]
    assert len(trials) == 12 and any(t["objective"] == 1.0 for t in trials)


def test_proposals_learn_and_metrics_have_a_direction(recipe):
    pytest.importorskip("optuna")
    axes = [parse_axis("rl.lam=0.0..1.0")]
    history = []
    for number in range(25):
        setting = propose(axes, history, number, 7, "minimize")
        assert setting == propose(axes, history, number, 7, "minimize")
        history.append({"setting": setting, "objective": abs(float(setting["rl.lam"]) - 0.8)})
    assert sum(h["objective"] for h in history[15:]) / 10 < 0.15 < sum(h["objective"] for h in history[:5]) / 5
    resolved = load_recipe(recipe)
    assert direction_of("valid/loss", resolved) == "minimize"
    assert choose_metric(None, resolved, axes) == ("reward/mean", "rl")
    assert choose_metric(None, resolved, [parse_axis("sft.optim.lr=1e-4,1e-5")]) == ("valid/loss", "sft")
    assert choose_metric("task/chrf", resolved, axes) == ("task/chrf", None)
    del recipe["rl"]
    assert choose_metric(None, load_recipe(recipe), axes) == ("valid/pair_accuracy", "reward")


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("reward/mean", "maximize"),
        ("reward/failed", "minimize"),
        ("reward/chrf", "maximize"),
        ("reward/length_words", "minimize"),  # paid for with a weight below 0
        ("task/ter", "minimize"),
        ("task/ter_high", "minimize"),
        ("task/glossary", "maximize"),  # a name of the user's
        ("policy/clipped_loss", "minimize"),
    ],
)
def test_which_way_is_better_is_the_recipes_to_say(recipe, metric, direction):
    recipe |= {"task": {"reference": "text", "metrics": ["chrf", "ter", "tests.scores:glossary"]}}
    recipe["rl"]["reward"] = {"chrf": 1.0, "length_words": -0.1}
    resolved = load_recipe(recipe)
    assert direction_of(metric, resolved) == direction
    side = "validation side" if metric.startswith("task/") else "training data"
    assert side in data_of(metric, None, resolved) and f"by {metric} of sft " in data_of(metric, "sft", resolved)


def test_a_search_without_optuna_says_what_to_install(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"--search needs optuna; pip install 'upslope\[search\]'"):
        search_module.load_optuna()


def steps_of(log):
    return [e["step"] for e in read_events(log) if e["kind"] == "step"] if log.exists() else []


def when(condition, act, seconds=90):
    """Do something in a thread once a condition holds."""

    def wait():
        end = time.monotonic() + seconds
        while time.monotonic() < end and not condition():
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_the_real_command_killed_stopped_and_carried_on_with_a_run_that_fails(sft_toml, rows, tmp_path):
    out, overrides = tmp_path / "s", ["checkpoint_minutes=10", "sft.steps=200"]
    log = out / "freeze_layers=0,seed=3" / "events.jsonl"
    command = [*COMMAND, str(sft_toml), "sft.freeze_layers=0,3", "--seeds", "1", "-o", str(out)]
    command += [part for override in overrides for part in ("-s", override)]

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    when(lambda: len(steps_of(log)) > 4, process.kill).join()  # its child sees that, saves and stops
    process.communicate()
    with (out / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held as long as the child lives
    killed_at = len(steps_of(log))
    assert 4 < killed_at < 200 and list(log.parent.glob("sft/checkpoints/*"))

    thread = when(lambda: len(steps_of(log)) > killed_at + 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped in freeze_layers=0,seed=3, 0 runs finished; the same command"):
        values = {"sft.freeze_layers": [0, 3]}
        upslope.sweep(str(sft_toml), values, *overrides, seeds=1, rows=rows, out=out, plain=True)
    thread.join()
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in runs.values()] == ["stopped", "waiting"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: 1 of the runs failed: freeze_layers=3,seed=3: freeze_layers = 3: the model has 2 blocks; lower it; "
        "the same command tries again"
    ]
    assert "2 values of sft.freeze_layers x 1 seed = 2 runs" in done.stdout
    assert "carries on after optimizer step" in done.stdout and steps_of(log) == list(range(1, 201))
    found = json.loads((out / "compare.json").read_text())
    assert found["measures"] == ["sft: valid/loss", "sft: valid/perplexity"]
    assert [row["state"] for row in found["rows"]] == ["1 done", "1 failed"]
