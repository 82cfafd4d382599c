"""Ratios, aims and the page, from results made by hand."""

import json

import pytest

from benchmarks.page import END, MARK, groups, write_page
from benchmarks.plan import Program
from benchmarks.record import line, read_line
from benchmarks.runner import Session, file_name, free_path
from benchmarks.sizes import SMOKE
from benchmarks.table import asked, markdown, missing, newest, section


def entry(by, what, repeat, value, peak_gb=1.0, **details):
    return {"by": by, "what": what, "repeat": repeat, "value": value, "peak_gb": peak_gb, "details": details}


def made(runs, day="2026-01-02", **changes):
    result = {
        "made": f"{day}T10:00:00+00:00",
        "machine": {"processor": "Some CPU (R) 9", "cores": 2},
        "device": "cpu",
        "dtype": "bf16",
        "threads": 2,
        "model": "m31",
        "size": "full",
        "commit": "0123456789abcdef",
        "changed_files": [],
        "versions": {"torch": "2.13.0"},
        "runs": runs,
        "not_measured": {},
    }
    return result | changes


def found(results):
    return {m.row.title: m for m in newest(results)}


GRPO = [
    entry("upslope", "grpo", 0, 4.0, 2.0),
    entry("trl", "grpo", 0, 20.0, 5.0),
    entry("upslope", "grpo", 1, 5.0, 2.0),
    entry("trl", "grpo", 1, 20.0, 3.0),
    entry("upslope", "grpo", 2, 8.0, 2.0),
    entry("trl", "grpo", 2, 24.0, 4.5),
]


def test_of_seconds_theirs_stand_above_and_extremes_are_of_one_turn():
    step = found([made(GRPO)])["GRPO step, against TRL"]
    assert (step.top, step.bottom) == (20.0, 5.0)
    assert (step.value, step.low, step.high, step.repeats, step.met) == (4.0, 3.0, 5.0, 3, "yes")
    memory = found([made(GRPO)])["GRPO peak memory, share of TRL's"]
    assert memory.value == 2.0 / 4.5 and memory.met == "yes"


def test_a_gpu_has_rows_of_its_own_and_none_of_a_processor_alone():
    runs = [*GRPO, entry("upslope", "decode-few", 0, 9.0, share=0.4), entry("upslope", "gae", 0, 1.0)]
    card = made(runs, device="cuda", machine={"processor": "Some CPU", "cores": 16, "gpu": "Some Card"}, size="gpu")
    rows = found([card])
    assert rows["decoding of few rows, share of its floor"].met == "no" and "GAE of 1,000,000 tokens" not in rows
    assert "GRPO step, against TRL" in rows and "GRPO peak memory, share of TRL's" not in rows
    assert not any("GAE" in line for line in missing([card], newest([card])))
    assert "decoding of few rows" not in found([made(runs)]) and "GAE of 1,000,000 tokens" in found([made(runs)])
    assert "Some Card" in section([card]) and file_name(card) == "2026-01-02-some-card-cuda-bf16-gpu-m31"
    assert [group[0]["size"] for group in groups([card, made(GRPO)])] == ["full", "gpu"]


def test_of_rates_ours_stand_above_and_a_missed_aim_says_so():
    runs = [entry("upslope", "generate", 0, 300.0), entry("vllm", "generate", 0, 200.0)]
    row = found([made(runs)])["generation, against vLLM"]
    assert (row.value, row.met) == (1.5, "no")


def test_a_figure_without_a_peer_is_held_against_its_aim():
    rows = found([made([entry("upslope", "gae", 0, 4.0), entry("upslope", "gae", 1, 6.0)])])
    assert rows["GAE of 1,000,000 tokens"].value == 5.0 and rows["GAE of 1,000,000 tokens"].met == "yes"


def test_what_was_not_measured_is_listed_with_its_reason_and_never_guessed():
    result = made([entry("upslope", "sft", 0, 4.0)], not_measured={"trl sft": "not installed"})
    assert "SFT, ragged lengths, against TRL" not in found([result])
    absent = missing([result], newest([result]))
    assert "SFT, ragged lengths, against TRL (trl sft: not installed)" in absent and len(absent) == len(asked([result]))


def test_each_row_is_of_the_newest_result_that_has_it():
    old = made([*GRPO, entry("upslope", "gae", 0, 9.0)])
    new = made([entry("upslope", "gae", 0, 2.0)], day="2026-01-03", commit="fedcba9876543210")
    rows = found([new, old])
    assert (rows["GAE of 1,000,000 tokens"].value, rows["GAE of 1,000,000 tokens"].commit) == (2.0, "fedcba9")
    assert rows["GRPO step, against TRL"].commit == "0123456"
    assert "| GAE of 1,000,000 tokens | 2 ms [2, 2] |  | <= 10 ms, further 3 ms | yes | 1 | fedcba9 |" in markdown(
        list(rows.values())
    )


def test_only_full_results_of_one_kind_share_a_table():
    fp32, smoke = made(GRPO, dtype="fp32"), made(GRPO, size="smoke", day="2026-02-01")
    assert [[r["dtype"] for r in group] for group in groups([fp32, smoke, made(GRPO, day="2026-01-05")])] == [
        ["bf16"],
        ["fp32"],
    ]


def test_the_page_is_written_between_its_marks_with_a_picture(tmp_path):
    page, picture = tmp_path / "README.md", tmp_path / "newest.png"
    page.write_text(f"before\n{MARK}\nold\n{END}\nafter\n")
    assert write_page([made(GRPO)], page, picture)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| GRPO step, against TRL | 4x [3, 5] | 20 / 5 | >= 4x, further 5x | yes | 3 | 0123456 |" in text
    assert "Not measured: generation, against transformers (not run)" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_full_result_the_page_stays(tmp_path):
    assert not write_page([made(GRPO, size="smoke")], tmp_path / "README.md", tmp_path / "newest.png")


def test_the_record_is_found_behind_whatever_a_peer_prints():
    record = line("generate", "vllm", 2.0, "tokens/s", packages=["numpy"], seconds=1.0)
    text = f"loading\n{json.dumps(record)}\ngoodbye"
    assert read_line(text) == record and read_line("nothing here") is None


def test_a_file_name_tells_the_machine_and_nothing_is_written_over(tmp_path):
    name = file_name(made(GRPO))
    assert name == "2026-01-02-some-cpu-r-9-2-cores-cpu-bf16-m31"
    free_path(tmp_path, name).write_text("{}")
    assert free_path(tmp_path, name).name == f"{name}-2.json"


@pytest.mark.parametrize(("peers", "reason"), [(None, "--peers"), ("empty", "venv-vllm is missing")])
def test_a_peer_that_is_not_there_is_noted(tmp_path, peers, reason):
    folder = tmp_path / peers if peers else None
    session = Session(tmp_path, SMOKE, folder, "bf16", "cpu", 1, 1)
    assert not session.can_run(Program("vllm", "generate"))
    assert reason in session.missing["vllm generate"]
    assert session.can_run(Program("upslope", "generate"))


def test_a_program_that_fails_is_noted_with_its_last_words(tmp_path):
    session = Session(tmp_path / "no-model", SMOKE, None, "bf16", "cpu", 1, 1)
    session.once("generate", Program("upslope", "generate"), 0)
    assert session.runs == [] and "status 1" in session.missing["upslope generate"]
