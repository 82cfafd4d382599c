"""Runs that are struck in every phase and by every kind of fault, started again by the same command, end where an
unbroken run ends: weights, optimizer, events and episodes bit for bit, no line twice, none missing, no file left over.

`make faults` does the same at hundreds of random points; see campaign.py.
"""

import os
from pathlib import Path
from typing import get_args

import pytest

from tests.faults.harness import STOP_S, Strike
from tests.faults.inject import PHASES
from tests.faults.variants import KINDS, PAIRS, SMALLEST, VARIANTS, recipe_of
from upslope.checkpoint import RunLock
from upslope.config import PRESETS, STAGES, Preference, load_recipe
from upslope.models.open import KINDS as MODEL_KINDS

FEW = 6  # computations that may still begin after a stop was asked for


def middle(harness, variant, phase, share):
    """The event that lies at a share of all those of a phase."""
    return max(1, round(share * harness.reference(variant)[1][phase]))


STRIKES = [
    ("ppo-shared", "generation", 0.4, "sigkill"),
    ("ppo-shared", "rewards", 0.3, "memory"),
    ("ppo-shared", "update", 0.6, "sigkill"),
    ("ppo-shared", "stages", 0.7, "sigkill"),
    ("ppo-detached", "update", 0.8, "sigterm"),
    ("ppo-detached", "checkpoint", 0.9, "sigkill"),
    ("ppo-detached", "log-probs", 0.6, "reward"),
    ("ppo-separate", "checkpoint", 0.7, "full-disk"),
    ("ppo-separate", "export", 0.6, "full-disk"),
    ("ppo-shared", "export", 0.4, "sigkill"),
    ("ppo-separate", "files", 0.8, "sigkill"),
    ("ppo-bf16", "update", 0.7, "sigkill"),
    ("ppo-bf16", "checkpoint", 0.8, "sigkill"),
    ("grpo", "update", 0.9, "sigterm"),
    ("trpo", "log-probs", 0.9, "sigkill"),
    ("nlpo", "generation", 0.75, "sigkill"),
    ("ppo-kl", "update", 0.7, "sigterm"),
    ("a2c", "log-probs", 0.9, "sigint"),
    ("reinforce", "generation", 0.4, "sigkill"),
    ("reinforce++", "update", 0.8, "sigkill"),
    ("rloo", "rewards", 0.4, "sigterm"),
    ("dr-grpo", "checkpoint", 0.6, "sigkill"),
    ("dapo", "generation", 0.6, "sigterm"),
    ("gspo", "update", 0.8, "memory"),
    ("cispo", "update", 0.8, "sigint"),
    ("raft", "stages", 0.5, "sigkill"),
    ("gkd", "files", 0.6, "full-disk"),
    ("pretrain", "update", 0.6, "sigint"),
    ("dpo", "update", 0.6, "sigterm"),
    ("ipo", "update", 0.7, "sigkill"),
    ("simpo", "checkpoint", 0.5, "sigkill"),
    ("orpo", "evaluation", 0.7, "sigint"),
    ("kto", "evaluation", 0.8, "sigkill"),
    ("kto", "checkpoint", 0.6, "sigkill"),
    ("expert", "generation", 0.6, "sigterm"),
    ("expert", "rewards", 0.5, "reward"),
    ("expert", "update", 0.6, "sigkill"),
    ("scratch-decoder", "files", 0.08, "sigkill"),
    ("scratch-decoder", "files", 0.1, "full-disk"),
    ("scratch-lstm", "log-probs", 0.8, "sigkill"),
    ("scratch-lstm", "update", 0.6, "sigterm"),
    ("scratch-encdec", "generation", 0.5, "sigkill"),
    ("scratch-encdec", "log-probs", 0.7, "sigterm"),
    ("scratch-encoder", "update", 0.8, "sigkill"),
    ("scratch-encoder", "evaluation", 0.7, "sigterm"),
    ("scratch-encoder", "generation", 0.3, "full-disk"),
    ("encoder-masked", "update", 0.3, "sigterm"),
    ("encoder-masked", "evaluation", 0.3, "sigkill"),
    ("encoder-masked", "checkpoint", 0.8, "sigkill"),
    ("fallback", "update", 0.8, "sigkill"),
    ("fallback", "generation", 0.5, "sigterm"),
    ("fallback", "export", 0.7, "sigkill"),
    ("judges", "rewards", 0.5, "sigterm"),
    ("judges", "evaluation", 0.3, "sigkill"),
    ("judges", "rewards", 0.9, "sigkill"),
    ("best", "evaluation", 0.3, "sigterm"),
    ("best", "update", 0.2, "sigkill"),
    ("best", "generation", 0.4, "sigterm"),
    ("best", "checkpoint", 0.5, "sigkill"),
    ("best", "update", 0.7, "sigint"),
    ("best", "stages", 0.6, "sigkill"),
    ("best", "export", 0.5, "sigkill"),
    ("best", "files", 0.7, "full-disk"),
    # while [task] is measured: after sft, at the start of rl, on the way, after expert, at the end
    ("task", "generation", 0.05, "sigterm"),
    ("task", "rewards", 0.01, "sigint"),
    ("task", "generation", 0.15, "sigterm"),
    ("task", "rewards", 0.1, "sigkill"),
    ("task", "generation", 0.4, "sigint"),
    ("task", "generation", 0.75, "sigterm"),
    ("task", "rewards", 0.9, "memory"),
]
# every algorithm on every kind of model but the decoder, above, each struck at a place and in a way of its own
PLACES = [(p, s) for s in (0.75, 0.55, 0.9) for p in ("update", "generation", "log-probs", "checkpoint", "rewards")]
PAIR_STRIKES = [
    (pair, *PLACES[n % len(PLACES)], ("sigkill", "sigterm", "sigkill", "sigint")[n % 4]) for n, pair in enumerate(PAIRS)
]


def test_every_algorithm_critic_stage_loss_and_dtype_is_struck():
    recipes = {name: load_recipe(recipe_of(name, Path("m"), Path("w"))) for name in {strike[0] for strike in STRIKES}}
    assert set(recipes) == set(VARIANTS)
    tables = [recipe.rl for recipe in recipes.values() if recipe.rl]
    assert {rl.algorithm for rl in tables} == set(PRESETS)
    assert {rl.critic for rl in tables} == {"none", "shared", "detached", "separate"}
    assert {stage for recipe in recipes.values() for stage in recipe.stages} == set(STAGES)
    losses = {recipe.preference.loss for recipe in recipes.values() if recipe.preference}
    assert losses == set(get_args(Preference.model_fields["loss"].annotation))
    assert {recipe.dtype for recipe in recipes.values()} == {"fp32", "bf16"}
    assert {strike[1] for strike in STRIKES} == set(PHASES)


def test_every_algorithm_is_struck_on_every_kind_of_model():
    assert set(PAIRS.values()) == {(kind, name) for kind in KINDS for name in PRESETS}
    assert {*KINDS, "decoder"} == set(MODEL_KINDS) and set(SMALLEST) == set(PRESETS)
    assert len({strike[1:3] for strike in PAIR_STRIKES}) == len(PLACES)


@pytest.mark.parametrize(("variant", "phase", "share", "kind"), STRIKES)
def test_c55_struck_and_started_again_it_ends_as_an_unbroken_run(harness, tmp_path, variant, phase, share, kind):
    strike = Strike(phase, middle(harness, variant, phase, share), kind)
    assert harness.trial(variant, tmp_path / "run", [strike]) == []
    assert harness.last_starts[0][1].fired


@pytest.mark.parametrize(("pair", "phase", "share", "kind"), PAIR_STRIKES)
def test_c55_every_algorithm_on_every_kind_of_model(harness, tmp_path, pair, phase, share, kind):
    phase = phase if harness.reference(pair)[1].get(phase) else "update"  # one that pays for nothing has no rewards
    strike = Strike(phase, middle(harness, pair, phase, share), kind)
    assert harness.trial(pair, tmp_path / "run", [strike]) == []
    assert harness.last_starts[0][1].fired


@pytest.mark.parametrize(("phase", "at"), [("generation", 1), ("generation", 9), ("rewards", 1)])
def test_a_stop_while_the_task_is_measured_saves_what_was_learned(harness, tmp_path, phase, at):
    """At the end of a supervised stage: nothing is fitted again, the held-out loss is measured and recorded once."""
    folder = tmp_path / "run"
    ended = harness.start("task", folder, Strike(phase, at, "sigterm"), minutes=60)
    assert ended.fired and ended.code == 130 and ended.seconds_after < STOP_S
    assert "stopped in sft after optimizer step 2, saved" in ended.said
    assert harness.trial("task", folder, [], minutes=60) == []
    counts = harness.counts(folder)
    assert counts["generation"] == harness.reference("task")[1]["generation"]
    assert counts["update"] < harness.reference("task")[1]["update"]


def test_c55_a_run_killed_three_times_in_a_row(harness, tmp_path):
    count = harness.reference("ppo-shared")[1]["checkpoint"]
    strikes = [Strike("checkpoint", count * n // 9, "sigkill") for n in (3, 1, 1)]
    assert harness.trial("ppo-shared", tmp_path / "run", strikes) == []


def test_c55_a_clock_that_runs_backwards_changes_nothing(harness, tmp_path):
    assert harness.trial("ppo-shared", tmp_path / "run", [Strike("stages", 4, "clock")]) == []


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        *((phase, "sigterm") for phase in PHASES if phase not in ("checkpoint", "files", "stages")),
        ("update", "sigint-twice"),
        ("evaluation", "sigint-twice"),
    ],
)
def test_a_stop_is_quick_in_every_phase(harness, tmp_path, phase, kind):
    """Within seconds here, and on models of any size: few computations begin between the signal and the end."""
    strike = Strike(phase, middle(harness, "ppo-shared", phase, 0.5), kind)
    ended = harness.start("ppo-shared", tmp_path / "run", strike, minutes=60)
    assert ended.code == 130 and ended.fired and ended.seconds_after < STOP_S
    assert harness.work_after(tmp_path / "run") <= FEW
    assert "the same command carries on" in ended.said


@pytest.mark.parametrize(("share", "stage"), [(0.1, "sft"), (0.5, "reward"), (0.9, "rl")])
def test_a_stop_while_a_model_is_written_waits_for_it_and_no_longer(harness, tmp_path, share, stage):
    """It waits for one file of the model's size; the checkpoint that it would else have to save is three times that."""
    folder = tmp_path / "run"
    strike = Strike("export", middle(harness, "ppo-shared", "export", share), "sigterm")
    ended = harness.start("ppo-shared", folder, strike, minutes=60)
    assert ended.fired and ended.code == 130 and ended.seconds_after < STOP_S
    assert (folder / stage / "model" / "model.safetensors").is_file() and (folder / stage / "done.json").is_file()
    assert harness.work_after(folder) == 0
    assert harness.trial("ppo-shared", folder, []) == []


def test_a_second_run_in_a_folder_in_use_is_refused_and_changes_nothing(harness, tmp_path):
    strike = Strike("update", 20, "sigkill")
    harness.start("ppo-shared", tmp_path / "run", strike)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    lock = RunLock(tmp_path / "run")
    try:
        ended = harness.start("ppo-shared", tmp_path / "run")
    finally:
        lock.release()
    assert ended.code == 2 and f"is in use by process {os.getpid()}; wait for it" in ended.said
    assert before == {p: p.read_bytes() for p in before}
    assert harness.trial("ppo-shared", tmp_path / "run", []) == []


def test_c59_a_finished_run_says_so_and_changes_nothing(harness):
    variant = VARIANTS[0]
    expected = harness.reference(variant)[0]
    assert harness.trial(variant, harness.work / f"unbroken-{variant}", []) == []
    ended = harness.start(variant, harness.work / f"unbroken-{variant}")
    assert ended.code == 0 and "finished before, nothing to train" in ended.said and expected
