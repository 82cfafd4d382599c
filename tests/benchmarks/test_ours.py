"""Every program of upslope's side runs at a tiny size and says what it promises; no time is asserted."""

import io
import json
import math
from contextlib import redirect_stdout

import pytest

from benchmarks.models import config_of, prepare, read_rows
from benchmarks.ours import __main__ as ours
from benchmarks.ours.ceilings import Ceilings, decoding_floor
from benchmarks.plan import ROWS, TASKS, UPSLOPE
from benchmarks.record import read_failures, read_lines
from benchmarks.sizes import SMOKE
from upslope.text.tokenizer import Tokenizer

pytestmark = pytest.mark.xdist_group("ours")  # each program runs once
UNITS = {
    "generate": "tokens/s",
    "generate-ragged": "tokens/s",
    "gemm-bound": "tokens/s",
    "grpo": "s/step",
    "ppo-separate": "s/step",
    "ppo-shared": "s/step",
    "sft": "tokens/s",
    "reward": "pairs/s",
    "dpo": "pairs/s",
    "start": "s",
    "logprobs": "s",
    "gae": "ms",
    "matrix": "GFLOP/s",
    "forward-backward": "GFLOP/s",
    "growth": "x",
    "bandwidth": "GB/s",
    "decode-few": "tokens/s",
    "decode-many": "tokens/s",
    "packed": "GFLOP/s",
    "gap": "nats",
    "profile-decode": "ms",
    "profile-training": "ms",
}
ON_A_GPU = {"peak_device_gb"}
MAY_BE_0 = {"gap", "decode-few", "decode-many", "profile-decode"}  # differences: on a busy machine even below


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("work"), SMOKE) / "tiny"


@pytest.fixture(scope="module")
def measured(model):
    """A program's line; each runs once."""
    lines = {}

    def run(name):
        if name not in lines:
            argv = [name, "--model", str(model), "--size", "smoke", "--threads", "1", "--dtype", "fp32"]
            with redirect_stdout(io.StringIO()) as out:
                ours.main(argv)
            lines[name] = json.loads(out.getvalue().splitlines()[-1])
        return lines[name]

    return run


@pytest.mark.parametrize("name", UNITS)
def test_a_program_prints_what_the_table_reads(name, measured):
    line = measured(name)
    assert (line["what"], line["by"], line["unit"]) == (name, UPSLOPE, UNITS[name])
    assert math.isfinite(line["value"]) and line["peak_gb"] > 0 and line["versions"]["torch"]
    assert line["value"] > 0 or name in MAY_BE_0
    for row in ROWS:
        for figure in (row.top, row.bottom):
            if figure is not None and (figure.by, figure.name) == (UPSLOPE, name):
                assert figure.field in line or figure.field in line["details"] or figure.field in ON_A_GPU


def test_every_program_is_in_a_task_and_tested():
    named = {p.name for programs in TASKS.values() for p in programs if p.by == UPSLOPE}
    assert named == set(ours.PROGRAMS) == set(UNITS)


def test_a_grpo_step_is_one_update_of_the_given_shape(measured):
    details = measured("grpo")["details"]
    assert details["updates"] == 1 and len(details["intervals"]) == SMOKE.grpo_steps - 1
    assert details["metrics"]["policy/sampler_gap_max"] < 1e-4


def test_a_ppo_batch_makes_every_epochs_minibatches(measured):
    details = measured("ppo-shared")["details"]
    assert details["updates"] == SMOKE.ppo_epochs * SMOKE.ppo_minibatches


def test_both_ways_of_log_probs_have_the_same_gradient(measured):
    assert measured("logprobs")["details"]["gradient_error"] < 1e-5


def test_shares_of_floors_are_of_what_was_measured(measured):
    decode, packed = (measured(name)["details"] for name in ("decode-many", "packed"))
    assert decode["rows"] == SMOKE.decode_rows[1]
    assert decode["share"] == pytest.approx(decode["floor_s"] / decode["step_s"])
    assert packed["micro_tokens"] in SMOKE.train_micro and packed["without_room"] == []
    assert packed["tokens"] >= SMOKE.train_tokens


def test_the_floor_of_a_step_is_the_larger_of_its_bytes_and_its_work():
    config = config_of(SMOKE.models["tiny"])
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96  # q and o, k and v, gate and up and down
    weights = 2 * per_layer + 512 * 64
    moved = 2 * (weights + 4 * 2 * 2 * 32 * 11)  # bf16; four rows hold ten tokens and write one
    work = 2 * 4 * weights + 4 * 4 * 2 * 64 * 10
    for bytes_s, flops_s in ((1e9, 1e20), (1e20, 1e9)):
        floor = decoding_floor(config, 4, 10, 2, Ceilings(bytes_s / 2, bytes_s, flops_s))
        assert (floor["bytes"], floor["flops"]) == (moved, work)
        assert floor["floor_s"] == pytest.approx(moved / 1e9 if bytes_s < flops_s else work / 1e9)


def test_sampler_and_trainer_agree_in_fp32(measured):
    assert measured("gap")["details"]["largest"] < 1e-4


def test_a_profile_names_what_takes_longest(measured):
    first = measured("profile-training")["details"]["table"].splitlines()
    assert "ms by the clock" in first[0] and len(first) > 10


def test_a_program_that_fails_keeps_no_other_from_running(model):
    argv = ["grpo", "bandwidth", "--model", str(model.parent / "none"), "--size", "smoke", "--dtype", "fp32"]
    with redirect_stdout(io.StringIO()) as out:
        assert ours.main(argv) == 1
    assert [found["what"] for found in read_lines(out.getvalue())] == ["bandwidth"]
    assert "none" in read_failures(out.getvalue())["grpo"]


def test_rows_have_the_lengths_they_promise_and_read_back_as_their_ids(model):
    tokenizer = Tokenizer.load(model)
    assert tokenizer.vocab_size == SMOKE.models["tiny"].vocab  # every logit is a token's
    for row in read_rows(model, "prompts"):
        assert len(row["ids"]) == SMOKE.prompt and tokenizer.encode(row["prompt"]) == row["ids"]
    for row in read_rows(model, "sft"):
        assert SMOKE.sft_low <= len(row["ids"]) <= SMOKE.sft_high
        assert [*tokenizer.encode(row["text"]), tokenizer.eos_id] == row["ids"]
    for row in read_rows(model, "pairs"):
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            assert SMOKE.sft_low <= len(ids) <= SMOKE.sft_high
            assert [*tokenizer.encode(row["prompt"] + row[side]), tokenizer.eos_id] == ids
