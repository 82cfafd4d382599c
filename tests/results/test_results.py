"""The results: runs of a small plan for real, what is recorded of them, and the pages made of records."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.runner import git
from results import page
from results.__main__ import main
from results.plan import Arm, Group, Job, chosen, read_plan
from results.record import RECORDS, read_records, stands_for, total
from results.runner import chains
from results.table import Outcome, outcomes, pooled
from tests.conftest import make_recipe
from upslope.errors import RecipeError, RunError

pytestmark = pytest.mark.xdist_group("results")  # the plan is run once
PLAN = """
[[row]]
name = "tiny"
title = { en = "a tiny one", zh = "很小的" }
recipe = "tiny.toml"
metric = "task: length_words"
set = ["eval.judges=[]"]
run = [
  { name = "ppo", seeds = [1, 2] },
  { name = "reinforce", seeds = [1], set = ["rl.algorithm=reinforce", "rl.epochs=1", "rl.minibatches=1"] },
]

[[study]]
name = "turns"
title = "turns"
recipe = "tiny.toml"
metric = "task: length_words"
columns = ["reward/mean", "advantage/std"]
run = [
  { as = "tiny-ppo", title = "as in the row" },
  { name = "first", seeds = [1] },
  { name = "second", seeds = [1], after = "first", set = ["sft=none"] },
]
"""
MARKED = f"# Page\n\n{page.MARK}\nold\n{page.END}\n\nthe end\n"


def write_toml(path, recipe):
    lines = [f"{k} = {json.dumps(v)}" for k, v in recipe.items() if not isinstance(v, dict)]
    for name, table in recipe.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    path.write_text("\n".join(lines))


def make_place(folder, model_dir, rows):
    """A folder with a plan, its recipe, its rows and two empty pages."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = make_recipe(model_dir)
    recipe["data"]["rows"] = str(folder / "rows.jsonl")
    recipe["task"] = {"metrics": ["length_words", "distinct_2"]}
    write_toml(folder / "tiny.toml", recipe)
    (folder / "plan.toml").write_text(PLAN)
    for name in page.FILES.values():
        (folder / name).write_text(MARKED)
    return folder


def arguments(place, *words):
    places = {"plan": place / "plan.toml", "out": place / "runs", "records": place / "records", "pages": place}
    return [*words, "--plain", *(f"--{name}={path}" for name, path in places.items())]


def call(monkeypatch, place, *words):
    monkeypatch.setattr(sys, "argv", ["results", *arguments(place, *words)])
    return main()


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir, rows):
    """The whole plan, run."""
    folder = make_place(tmp_path_factory.mktemp("results"), model_dir, rows)
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, folder) == 0
    return folder


def test_every_run_of_the_plan_is_recorded_with_what_it_took(place):
    records = read_records(place / "records")
    names = ["tiny-ppo-1", "tiny-ppo-2", "tiny-reinforce-1", "turns-first-1", "turns-second-1"]
    assert sorted(records) == names
    for record in records.values():
        assert record["prompts"] == 8 and record["command"].startswith("upslope train tiny.toml")
        assert record["commit"] == git("rev-parse", "HEAD")
        assert list(record["table"]["task: length_words"]) == ["before", "after", "change"]
        for cost in record["stages"].values():
            assert cost["tflop"] >= 0 and cost["tokens_read"] > 0 and cost["seconds"] > 0 and cost["peak_gb"] > 0
    assert list(records["tiny-ppo-1"]["stages"]) == ["sft", "reward", "rl"]
    assert total(records["tiny-ppo-1"], "samples", rl=False) == 3 * 4 + 3 * 4
    assert total(records["tiny-ppo-1"], "samples", rl=True) == 3 * 6
    assert total(records["tiny-ppo-1"], "peak_gb") == max(
        c["peak_gb"] for c in records["tiny-ppo-1"]["stages"].values()
    )


def test_the_closing_table_can_be_made_from_the_answers(place):
    folder = place / "runs" / "tiny-ppo-1" / "eval"
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    table = json.loads((folder / "done.json").read_text())
    assert len(lines) == table["prompts"]
    for label in ("before", "after"):
        scores = [line["answers"][label]["scores"]["reward: learned"] for line in lines]
        assert sum(scores) / len(scores) == pytest.approx(table["metrics"]["reward: learned"][label], abs=1e-5)
        assert table["intervals"]["reward: learned"][label][0] == table["metrics"]["reward: learned"][label]
        record = read_records(place / "records")["tiny-ppo-1"]["table"]["reward: learned"][label]
        assert record == pytest.approx(table["intervals"]["reward: learned"][label], abs=1e-6)
        lengths = [line["answers"][label]["tokens"] for line in lines]
        assert sum(lengths) / len(lengths) == table["metrics"]["mean length, tokens"][label]


def test_stages_before_rl_are_shared_by_the_runs_of_a_seed(place):
    records = read_records(place / "records")
    assert records["tiny-ppo-1"]["shared"] == "" and records["tiny-ppo-2"]["shared"] == ""
    assert records["tiny-reinforce-1"]["shared"].startswith("sft, reward: taken from tiny-ppo-1")
    first, second = records["tiny-ppo-1"], records["tiny-reinforce-1"]
    assert first["stages"]["sft"] == second["stages"]["sft"]
    assert first["table"]["task: length_words"]["before"] == second["table"]["task: length_words"]["before"]


def test_an_arm_begins_with_the_last_model_of_another(place):
    recipe = json.loads((place / "runs" / "turns-second-1" / "recipe.json").read_text())
    assert recipe["model"] == str((place / "runs" / "turns-first-1" / "rl" / "model").resolve())
    command = read_records(place / "records")["turns-second-1"]["command"]
    assert "-s model=RUNS/turns-first-1/rl/model -o RUNS/turns-second-1" in command
    assert recipe["sft"] is None
    first, second = (read_records(place / "records")[f"turns-{name}-1"]["table"] for name in ("first", "second"))
    assert first["task: length_words"]["after"] == second["task: length_words"]["before"]


def test_what_has_a_record_is_not_run_again_and_a_changed_recipe_is(place, monkeypatch, capsys):
    assert call(monkeypatch, place) == 0
    assert "5 runs, 5 recorded before" in capsys.readouterr().out
    job = chosen(read_plan(place / "plan.toml"), ["tiny-ppo-1"])[0]
    record = read_records(place / "records")[job.name]
    assert stands_for(record, job)
    text = (place / "tiny.toml").read_text()
    try:
        (place / "tiny.toml").write_text(f"# a remark\n{text}")
        assert stands_for(record, job)
        (place / "tiny.toml").write_text(text.replace('"samples_every": 1', "").replace("steps = 3", "steps = 4"))
        assert not stands_for(record, job)
        found = outcomes(read_plan(place / "plan.toml"), read_records(place / "records"))
        counts = [(o.group.name, o.arm.name, o.waiting) for o in found]
        assert counts[:3] == [("tiny", "ppo", 2), ("tiny", "reinforce", 1), ("turns", "ppo", 2)]
        assert counts[3:] == [("turns", "first", 1), ("turns", "second", 1)]
    finally:
        (place / "tiny.toml").write_text(text)


def test_the_pages_say_what_the_records_say(place):
    records = read_records(place / "records")
    pages = [(place / name).read_text() for name in page.FILES.values()]
    both = [records[f"tiny-ppo-{seed}"]["table"]["task: length_words"] for seed in (1, 2)]
    for text in pages:
        assert text.startswith("# Page") and text.endswith("the end\n") and "old" not in text
        for label in ("before", "after"):
            assert pooled([table[label] for table in both]).text(3) in text
        assert pooled([table["change"] for table in both]).text(3, signed=True) in text
        for record in records.values():
            assert record["command"] in text
        assert f"{sum(cost['tflop'] for cost in records['tiny-ppo-1']['stages'].values()):.1f}" in text
        study = text.split("## turns")[1]
        assert f"| as in the row | 2 | {pooled([table['before'] for table in both]).text(3)} |" in study
    assert "a tiny one" in pages[0] and "很小的" in pages[1]


def test_two_runs_at_once_are_stopped_by_one_ctrl_c_and_carry_on(tmp_path, model_dir, rows):
    place = make_place(tmp_path / "place", model_dir, rows)
    recipe = (place / "tiny.toml").read_text().replace("steps = 3", "steps = 400", 1)  # of sft: time to be struck in
    (place / "tiny.toml").write_text(recipe)
    command = [sys.executable, "-m", "results", *arguments(place, "tiny-ppo"), "--at-once=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folders = [place / "runs" / f"tiny-ppo-{seed}" for seed in (1, 2)]
    logs = [folder / "events.jsonl" for folder in folders]
    end = time.monotonic() + 300
    while not all(log.is_file() and '"step"' in log.read_text() for log in logs) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command carries on" in said
    assert not (place / "records").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(read_records(place / "records")) == ["tiny-ppo-1", "tiny-ppo-2"]
    for folder in folders:
        assert "carries on after" in folder.with_name(f"{folder.name}.log").read_text()
    assert "carries on after" not in done.stdout and str(folders[1].with_name("tiny-ppo-2.log")) in done.stdout


def test_runs_of_one_recipe_and_seed_wait_for_each_other(place):
    found = chains(chosen(read_plan(place / "plan.toml"), []))
    assert [[job.name for job in chain] for chain in found] == [
        ["tiny-ppo-1", "tiny-reinforce-1", "turns-first-1", "turns-second-1"],
        ["tiny-ppo-2"],
    ]


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_runs_at_once_that_is_none_is_told(place, monkeypatch, capsys, number):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, place, f"--at-once={number}")
    assert f"'{number}' is no number of runs: write 1 or more" in capsys.readouterr().err


def test_a_run_that_other_code_began_is_not_carried_on(tmp_path, monkeypatch, capsys, model_dir, rows):
    place = make_place(tmp_path / "place", model_dir, rows)
    begun = place / "runs" / "tiny-ppo-1"
    begun.mkdir(parents=True)
    (begun / "commit.txt").write_text("0123456" + 33 * "0")
    assert call(monkeypatch, place, "tiny-ppo-1") == 1
    said = capsys.readouterr().err
    assert "tiny-ppo-1 was begun with the code of 0123456, not today's" in said and f"delete {begun}" in said
    assert not (place / "records").exists()


def test_a_run_that_fails_is_told_and_stops_no_other(place, tmp_path, monkeypatch, capsys, model_dir, rows):
    other = make_place(tmp_path / "place", model_dir, rows)
    plan = PLAN.replace(
        'name = "reinforce", seeds = [1], set = [', 'name = "bad", seeds = [1], set = ["rl.reward=no_file.py:f", '
    )
    (other / "plan.toml").write_text(plan.replace("seeds = [1, 2]", "seeds = [1]"))
    assert call(monkeypatch, other, "tiny-bad", "tiny-ppo") == 1
    assert "failed: tiny-bad-1: " in capsys.readouterr().err
    assert list(read_records(other / "records")) == ["tiny-ppo-1"]
    assert "- a tiny one, bad: 1" in (other / "results.md").read_text()


def test_mistakes_in_a_plan_are_told(tmp_path, monkeypatch, capsys, model_dir, rows):
    place = make_place(tmp_path / "place", model_dir, rows)
    for old, new, told in (
        ("metric =", "metrik =", "key 'metrik'"),
        ('after = "first"', 'after = "last"', "comes after 'last'"),
        ('as = "tiny-ppo"', 'as = "tiny-a2c"', "shows 'tiny-a2c', which no row"),
        ('zh = "很小的"', 'fr = "petit"', "languages en, fr"),
        ('name = "turns"', 'name = "tiny"', "two runs called tiny-ppo-1"),
        ('"rl.epochs=1"', '"rl.epoch=1"', "rl.epoch"),
    ):
        (place / "plan.toml").write_text(PLAN.replace(old, new))
        with pytest.raises(RecipeError, match=told):
            read_plan(place / "plan.toml")
    (place / "plan.toml").write_text(PLAN)
    assert call(monkeypatch, place, "nothing-like-it") == 2
    assert "nothing in the plan is called 'nothing-like-it'" in capsys.readouterr().err


def test_first_seeds_come_before_second_ones(place):
    jobs = chosen(read_plan(place / "plan.toml"), [])
    assert [job.seed for job in jobs] == [1, 1, 1, 1, 2]
    assert [job.name for job in chosen(read_plan(place / "plan.toml"), ["tiny-ppo"])] == ["tiny-ppo-1", "tiny-ppo-2"]


def test_an_interval_over_seeds_by_hand():
    one = pooled([[0.5, 0.4, 0.7]])
    assert (one.value, one.low, one.high) == (0.5, 0.4, 0.7)
    two = pooled([[0.2, 0.2 - 1.959964, 0.2 + 1.959964], [0.4, 0.4 - 1.959964, 0.4 + 1.959964]])
    assert two.value == pytest.approx(0.3)
    assert two.high - two.value == pytest.approx(1.959964 * math.sqrt((0.02 + 1.0) / 2), rel=1e-5)


def outcome_of(metric, change, size="full"):
    job = Job("g", "a", 1, "sentiment-ppo", ())
    record = {
        "seed": 1,
        "digest": job.digest(),
        "size": size,
        "table": {metric: {"before": [1, 1, 1], "after": [1, 1, 1], "change": change}},
    }
    group = Group(
        "g", "row", metric, {"en": "g", "zh": "g"}, {"en": "", "zh": ""}, (Arm("a", {"en": "a", "zh": "a"}, (job,)),)
    )
    return outcomes([group], {job.name: record})[0]


def test_better_is_what_lies_beyond_its_interval_in_the_direction_that_is_a_gain():
    assert outcome_of("task: accuracy", [0.1, 0.01, 0.2]).verdict == "better"
    assert outcome_of("task: accuracy", [0.1, -0.01, 0.2]).verdict == "even"
    assert outcome_of("task: accuracy", [-0.1, -0.2, -0.01]).verdict == "worse"
    assert outcome_of("task: ter", [-0.1, -0.2, -0.01]).verdict == "better"


def test_a_row_that_did_not_get_better_is_explained_or_said_to_be_unexplained():
    even, better = (outcome_of("task: accuracy", [0.1, low, 0.2]) for low in (-0.01, 0.01))
    for o in (even, better):
        o.records[0]["alarms"] = []
    unexplained = page.WORDS["unexplained"]["en"]
    assert page.remarks([even], {}, "en") == [f"**g, a**: {unexplained}"]
    assert page.remarks([better], {}, "en") == []
    notes = {"g": {"en": "because", "zh": "因为"}, "g-a": {"en": "of a", "zh": "a 的"}}
    assert page.remarks([even], notes, "zh") == ["**g**: 因为", "**g, a**: a 的"]
    assert page.remarks([even, better], {"g": notes["g"]}, "en") == ["**g**: because"]  # once for all its algorithms
    better.records[0]["alarms"] = ["it | fell by -0.50", "it | fell by 1.25", "another"]
    assert page.remarks([better], {}, "en") == [
        "**g, a**: Alarms of seed 1: 2, the first: it &#124; fell by -0.50. Alarms of seed 1: 1, the first: another."
    ]


def test_smoke_runs_measure_nothing():
    assert isinstance(outcome_of("task: accuracy", [0.1, 0.01, 0.2], size="smoke"), Outcome)
    assert outcome_of("task: accuracy", [0.1, 0.01, 0.2], size="smoke").records == ()


def test_a_page_without_marks_is_told(tmp_path):
    (tmp_path / "results.md").write_text("nothing")
    with pytest.raises(RunError, match="has no <!-- results -->"):
        page.write_pages([], {}, tmp_path)


def test_the_plan_can_be_read_and_the_committed_pages_are_those_of_the_committed_records():
    groups, records = read_plan(), read_records(RECORDS)
    found, notes = outcomes(groups, records), page.read_notes()
    for language, name in page.FILES.items():
        text = (page.PAGES / name).read_text()
        between = text.split(f"{page.MARK}\n")[1].split(f"\n{page.END}")[0]
        assert between == page.made(found, notes, language), "python -m results --page"
    names = {job.name for group in groups for job in group.own_jobs}
    assert set(records) <= names, "a record of a run that the plan does not have"
