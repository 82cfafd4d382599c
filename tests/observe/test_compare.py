"""Comparisons: hand-computed statistics, and what is written of made-up run folders."""

import json
import math
import re
import subprocess
import sys

import pytest
from rich.console import Console

from upslope.config import load_recipe
from upslope.errors import RunError
from upslope.observe.compare import as_cells, as_markdown, compare, compare_runs, show
from upslope.observe.events import EventLog
from upslope.observe.runs import (
    differing,
    estimate,
    find_runs,
    flat,
    last_quarter,
    measures,
    objective,
    read_run,
    short_names,
    t_quantile,
)

RECIPE = {"model": "m", "data": {"rows": "r", "text": "t", "prompt_words": 2}}


def make_run(folder, *, rewards=(0.0, 1.0, 2.0, 3.0), advantages=True, after=0.5, steps=4, recipe=None, **rl):
    """A run folder with an rl stage, as the loops write it; unfinished where there are fewer rewards than steps."""
    folder.mkdir(parents=True)
    table = {"name": "x", "model": "m", "seed": 1, "checkpoint_minutes": 3.0, "optim": {"lr": 1e-5}, "sft": None}
    table |= {"rl": {"lam": 0.95, "steps": steps, "optim": {"lr": 1e-5}, **rl}, **(recipe or {})}
    (folder / "recipe.json").write_text(json.dumps(table))
    log = EventLog(folder / "events.jsonl")
    for step, reward in enumerate(rewards, 1):
        metrics = {"reward/mean": reward, "time/step_s": float(step), "tokens/sampled": 10.0 * step * step}
        metrics |= {"kl/reference_per_completion": step / 10, "critic/explained_variance": step / 4}
        if advantages:
            metrics |= {"advantage/std": step / 2, "advantage/bias": -1.0, "advantage/rmse": 2.0}
        log.write("step", stage="rl", step=step, metrics=metrics)
    log.close()
    if len(rewards) == steps:
        for stage, found in (("rl", {}), ("eval", {"reward: r": {"before": 0.0, "after": after}})):
            (folder / stage).mkdir()
            (folder / stage / "done.json").write_text(json.dumps({"metrics": found}))
    return folder


def make_sweep(folder, **options):
    for lam in (0.9, 1.0):
        for seed, after in ((1, lam), (2, lam + 0.2), (3, lam + 0.1)):
            make_run(folder / f"lam={lam},seed={seed}", after=after, lam=lam, recipe={"seed": seed}, **options)
    return folder


def test_the_interval_is_students():
    found = estimate([1.0, 2.0, 3.0, 6.0])  # mean 3, s = sqrt(14/3), t(3) = 3.1824
    assert found.mean == 3.0 and found.half == pytest.approx(3.1824 * math.sqrt(14 / 3) / 2)
    assert estimate([2.0]).half is None and estimate([2.0, 2.0]).half == 0.0
    for freedom, value in ((1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (20, 2.086), (30, 2.042), (1000, 1.962)):
        assert t_quantile(freedom) == pytest.approx(value, abs=6e-4)


def test_the_measures_of_a_run_by_hand(tmp_path):
    found = measures(read_run(make_run(tmp_path / "a", rewards=[0.0, 1.0, 2.0, 3.0, 5.0, 7.0], steps=6)))
    assert list(found) == [
        *("reward: r", "reward/mean", "advantage/std", "advantage/bias", "advantage/rmse"),
        *("kl/reference_per_completion", "critic/explained_variance", "time/step_s", "tokens/s"),
    ]
    assert found["reward/mean"] == 6.0  # the last two of six
    assert found["kl/reference_per_completion"] == pytest.approx(0.55)
    assert found["advantage/std"] == 1.75 and found["advantage/bias"] == -1.0  # over all rollouts
    assert found["time/step_s"] == 3.5 and found["tokens/s"] == 35.0  # medians of 1..6 and of 10, 20, ... 60
    assert [len(last_quarter([(0, 0.0)] * n)) for n in (1, 4, 5, 8, 30)] == [1, 1, 2, 2, 8]


def test_an_objective_is_of_training_or_validation_and_of_the_last_stage(tmp_path):
    folder = make_run(tmp_path / "a")
    log = EventLog(folder / "events.jsonl", keep_bytes=(folder / "events.jsonl").stat().st_size)
    for step, loss in ((0, 5.0), (9, 4.0)):
        log.write("eval", stage="sft", step=step, metrics={"valid/loss": loss})
    log.close()
    run = read_run(folder)
    assert objective(run, "valid/loss") == 4.0 and objective(run, "reward/mean") == 3.0
    assert objective(run, "reward: r") is None


def test_a_held_out_metric_is_of_the_model_that_a_stage_hands_on(tmp_path):
    folder = make_run(tmp_path / "a", recipe={"sft": {"steps": 9}, "rl": None}, rewards=(), steps=9)
    log = EventLog(folder / "events.jsonl", keep_bytes=(folder / "events.jsonl").stat().st_size)
    for step, loss in ((0, 5.0), (3, 4.0), (6, 4.5), (9, 6.0)):
        log.write("eval", stage="sft", step=step, metrics={"valid/loss": loss})
    log.close()
    assert objective(read_run(folder), "valid/loss", "sft") == 6.0  # not finished: as far as it came
    (folder / "sft").mkdir()
    (folder / "sft" / "done.json").write_text(json.dumps({"metrics": {"valid/loss": 4.0, "best/step": 3}}))
    run = read_run(folder)
    assert objective(run, "valid/loss") == objective(run, "valid/loss", "sft") == 4.0
    assert objective(run, "valid/loss", "rl") is None
    assert measures(run)["sft: valid/loss"] == 4.0


def test_what_differs_is_found_and_named():
    a = {"seed": 1, "name": "a", "rl.lam": 1, "optim.lr": 1, "rl.optim.lr": 1, "sft.optim.lr": 7, "only": 2}
    b = {"seed": 2, "name": "b", "rl.lam": 2, "optim.lr": 2, "rl.optim.lr": 2, "sft.optim.lr": 7}
    assert differing([a, b]) == ["rl.lam", "optim.lr"]
    assert differing([a, b | {"rl.optim.lr": 3}]) == ["rl.lam", "optim.lr", "rl.optim.lr"]
    names = short_names(["rl.lam", "optim.lr", "rl.optim.lr", "rl.kl"])
    assert list(names.values()) == ["lam", "optim.lr", "rl.optim.lr", "kl"]


def test_a_sweep_is_one_row_a_combination(tmp_path):
    found, out = compare([make_sweep(tmp_path / "s")])
    assert out == tmp_path / "s" and found.settings == ["rl.lam"]
    titles, cells = as_cells(found)
    assert titles[:4] == ["lam", "state", "reward: r", "training reward"]
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert [row[:3] for row in cells] == [
        ["0.9", "3 done", f"1.00 ± {half:.2f}"],
        ["1.0", "3 done", f"1.10 ± {half:.2f}"],
    ]
    written = json.loads((out / "compare.json").read_text())
    assert written["rows"][1]["measures"]["reward: r"]["values"] == [1.0, 1.2, 1.1]
    assert written["rows"][1]["measures"]["reward: r"]["half_width_95"] == pytest.approx(half, rel=1e-4)
    assert "95 % Student-t interval over up to 3 seeds" in (out / "compare.md").read_text()
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    before = {p.name: p.read_bytes() for p in out.glob("compare.*")}
    compare([out])
    assert before == {p.name: p.read_bytes() for p in out.glob("compare.*")} and len(before) == 4


def test_unfinished_and_failed_runs_are_said_and_do_not_enter_a_mean(tmp_path):
    folder = make_sweep(tmp_path / "s")
    make_run(folder / "lam=1.0,seed=4", rewards=(9.0,), lam=1.0, recipe={"seed": 4})
    make_run(folder / "lam=0.5,seed=1", rewards=(9.0, 9.0), lam=0.5)
    runs = {"lam=0.5,seed=1": {"status": "failed", "reason": "no luck"}, "lam=1.0,seed=4": {"status": "stopped"}}
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    rows = {row.label: row for row in compare_runs([folder]).rows}
    assert list(rows) == ["lam=0.5", "lam=0.9", "lam=1.0"]
    assert rows["lam=1.0"].state == "3 done, 1 unfinished" and rows["lam=0.5"].state == "1 failed"
    assert rows["lam=1.0"].estimates["reward/mean"].mean == 3.0
    assert rows["lam=0.5"].estimates["reward/mean"].mean == 9.0
    assert "failed: lam=0.5,seed=1: no luck" in as_markdown(compare_runs([folder]))


def test_any_runs_are_one_row_each_and_what_is_missing_is_a_dash(tmp_path):
    a = make_run(tmp_path / "a", advantages=False)
    b = make_run(tmp_path / "b", rewards=(1.0, 2.0), recipe={"seed": 2})
    c = tmp_path / "c"
    c.mkdir()
    (c / "recipe.json").write_text(json.dumps({"name": "x", "sft": {"steps": 5, "optim": {"lr": 1e-5}}, "rl": None}))
    log = EventLog(c / "events.jsonl")
    log.write("eval", stage="sft", step=5, metrics={"valid/loss": 4.5})
    log.close()
    (c / "sft").mkdir()
    (c / "sft" / "done.json").write_text('{"metrics": {}}')
    found, out = compare([a, b, c], tmp_path / "out")
    titles, cells = as_cells(found)
    table = {row[0]: dict(zip(titles, row, strict=True)) for row in cells}
    assert table["a"]["advantage std"] == "-" and table["a"]["reward: r"] == "0.500"
    assert (
        table["b"]["advantage std"] == "0.750" and table["b"]["reward: r"] == "-" and table["b"]["state"] == "rl 2 of 4"
    )
    assert table["c"]["sft: valid/loss"] == "4.50" and table["c"]["state"] == "done" and table["c"]["stages"] == "sft"
    assert "seed" not in titles and (out / "compare.svg").is_file()


def test_the_table_fits_a_narrow_terminal_and_is_whole_in_a_file(tmp_path, capsys):
    found = compare_runs([make_sweep(tmp_path / "s")])
    show(found)
    said = capsys.readouterr().out
    assert "…" not in said and said.count("lam  ") == 1
    narrow = Console(width=60, force_terminal=True, highlight=False, no_color=True)
    show(found, narrow)
    said = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "…" not in said and said.count(" lam  ") > 1 and max(map(len, said.splitlines())) <= 60


def test_comparing_and_sweeping_do_not_wait_for_torch():
    code = (
        "import sys, upslope.observe.compare, upslope.training.sweep; assert not {'torch', 'optuna'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("label", ["a$b$c", "名字", "x" * 200])
def test_odd_names_are_drawn(tmp_path, label):
    compare([make_run(tmp_path / label), make_run(tmp_path / "other", lam=0.5)], tmp_path / "out")
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


def test_many_combinations_of_several_keys_are_drawn(tmp_path):
    for n in range(13):
        values = {"lam": n / 13, "kl": 10.0 ** -(n % 3)}
        make_run(tmp_path / "s" / f"n={n}", **values, reward={"m:f": 1.0} if n % 2 else "m:f")
    (tmp_path / "s" / "sweep.json").write_text(
        json.dumps({"runs": {}, "search": {"metric": "reward/mean", "direction": "maximize", "data": "d"}})
    )
    compare([tmp_path / "s"])
    (tmp_path / "s" / "sweep.json").unlink()
    compare([tmp_path / "s"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "holds no run and no sweep; name the folder of a run or of a sweep"),
        (lambda p: (p / "recipe.json").write_text("{"), "is damaged"),
        (lambda p: (p / "sweep.json").write_text('{"runs": {"a": {"status": "waiting"}}}'), "no run has begun"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(RunError, match=message) as caught:
        compare([tmp_path])
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError):
        find_runs(tmp_path / "nowhere")


def test_keys_that_an_algorithms_name_brings_with_it_are_no_columns():
    def settings(algorithm, **keys):
        rl = load_recipe(RECIPE | {"rl": {"reward": "a:b", "algorithm": algorithm, **keys}}).model_dump(mode="json")
        return flat(rl)

    assert differing([settings("ppo"), settings("grpo"), settings("trpo")]) == ["rl.algorithm"]
    assert differing([settings("ppo"), settings("grpo", samples=4)]) == ["rl.algorithm", "rl.samples"]
    assert differing([settings("ppo"), settings("ppo", lam=0.5)]) == ["rl.lam"]
