"""Every program of upslope's side runs at a tiny size and says what it promises; no time is asserted."""

import io
import json
import math
from contextlib import redirect_stdout

import pytest

from benchmarks.models import prepare, read_rows
from benchmarks.ours import __main__ as ours
from benchmarks.plan import ROWS, TASKS, UPSLOPE
from benchmarks.sizes import SMOKE
from upslope.text.tokenizer import Tokenizer

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
}


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
    assert line["value"] > 0 and math.isfinite(line["value"]) and line["peak_gb"] > 0 and line["versions"]["torch"]
    for row in ROWS:
        for figure in (row.top, row.bottom):
            if figure is not None and (figure.by, figure.name) == (UPSLOPE, name):
                assert figure.field in line or figure.field in line["details"]


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
