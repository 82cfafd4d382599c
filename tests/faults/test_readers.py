"""Damaged and random input to every reader is accepted or refused in one line: never another exception, never a hang.

`make fuzz` goes on with the same targets for minutes, led by coverage.
"""

import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.targets import TARGETS, meets


@functools.cache
def seeds(name):
    return TARGETS[name].seeds()


NUMBERS = [b"0", b"-1", b"1e999", b"99999999999999999999", b"null", b"[]", b"{}", b'""', b"NaN", b"true"]


@st.composite
def damaged(draw, name):
    """A good input with some bytes flipped, cut out, doubled, replaced, or its end cut off; now and then pure noise."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(1, 4))):
        # headers stand at the front and bodies are long: half of the damage goes to the first bytes
        place = draw(st.integers(0, min(len(data), 400) if draw(st.booleans()) else len(data)))
        length = draw(st.integers(0, 30))
        kind = draw(st.sampled_from(("flip", "cut", "double", "noise", "number", "end")))
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place : place + length]
        elif kind == "double":
            data[place:place] = data[place : place + length]
        elif kind == "noise":
            data[place : place + length] = draw(st.binary(max_size=30))
        elif kind == "number":
            data[place : place + length] = draw(st.sampled_from(NUMBERS))
        elif kind == "end":
            del data[place:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_good_input_is_accepted(tmp_path, name):
    assert [meets(TARGETS[name], tmp_path, seed) for seed in seeds(name)] == ["accepted"] * len(seeds(name))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_one_line_or_accepted(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("input")

    @settings(max_examples=60, deadline=10_000, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(name))
    def check(data):
        meets(TARGETS[name], folder, data)

    check()
