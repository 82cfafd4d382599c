"""What the soak says of an hour: slopes and their intervals, of numbers made by hand."""

import json

import numpy as np
import pytest

import upslope
from tests.faults import soaked
from tests.faults.soak import ALLOWED, trend, trends
from upslope.training.run import Run
from upslope.training.state import RunState


def hour(seed, grows=0.0, leaks=0.0, slows_all=0.0, neighbours=0.0):
    """An hour's samples: a rollout that grows by a share, MB that leak, a process that slows itself, neighbours."""
    draw = np.random.default_rng(seed)
    times = np.arange(0.0, 3600.0, 1.0)
    busy = 1 + neighbours * times / 3600  # both slow down
    samples = [
        {"at": t, "trainer": 500 + leaks * t / 3600, "worker": 15.0, "beside_s": 0.02 * b * draw.normal(1, 0.05)}
        for t, b in zip(times, busy, strict=True)
    ]
    own = busy * (1 + slows_all * times / 3600)
    notes = [
        {
            "at": t,
            "rollout_s": 0.04 * b * (1 + grows * t / 3600) * draw.normal(1, 0.05),
            "reference_s": 0.02 * b * draw.normal(1, 0.05),
        }
        for t, b in zip(times, own, strict=True)
    ]
    return samples, notes


def verdicts(**changes):
    return [one.flat for one in trends(*hour(1, **changes)).values()]


def test_an_hour_that_is_flat_is_called_so_whatever_the_neighbours_do():
    assert verdicts() == [True] * 4
    assert verdicts(neighbours=0.5) == [True] * 4


@pytest.mark.parametrize(("what", "row"), [("leaks", 0), ("grows", 2), ("slows_all", 3)])
def test_what_grows_is_told_in_its_row(what, row):
    found = verdicts(**{what: 10.0 if what == "leaks" else 0.1})
    assert [n for n, flat in enumerate(found) if not flat] == [row]


def test_the_interval_holds_the_slope_as_often_as_it_says_also_where_minutes_are_alike():
    """White noise, and noise in which a minute is much like the one before: 95 % is the aim, 90 % of 300 the test."""
    for alike in (0.0, 0.6):
        held = 0
        for seed in range(300):
            draw = np.random.default_rng(seed)
            noise = np.zeros(60)
            for n in range(60):
                noise[n] = alike * noise[n - 1] + draw.normal()
            x = np.arange(60) * 60.0
            found = trend(list(x), list(1000 + 20 * x / 3600 + noise), "MB")
            held += abs(found.slope - 20) <= found.half
        assert held >= 270


def test_too_few_samples_have_no_slope():
    with pytest.raises(ValueError, match="too few"):
        trend([0.0, 1.0], [1.0, 1.0], "MB")


def test_an_interval_that_reaches_out_of_the_bound_decides_nothing():
    draw = np.random.default_rng(0)
    found = trend(list(range(3600)), list(500 + 200 * draw.normal(size=3600)), "MB")
    assert abs(found.slope) + found.half > ALLOWED["MB"] and not found.flat


def test_the_meter_notes_blocks_of_rollouts_of_a_real_run(recipe, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(soaked, "BLOCK", 2)
    monkeypatch.setattr(Run, "record", Run.record)  # put back afterwards
    monkeypatch.setattr(RunState, "save", RunState.save)
    soaked.Meter(tmp_path / "notes").install()
    del recipe["sft"]
    upslope.train(recipe, "rl.steps=5", rows=rows, out=tmp_path / "run", plain=True)
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(notes) == 2 and all(0 < note["rollout_s"] < 30 and note["reference_s"] > 0 for note in notes)
    assert notes[0]["objects"] > 1000 and "objects" not in notes[1]
