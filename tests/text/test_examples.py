"""Examples and pairs come back from their buffers as they were, in memory or in a file that nothing is left of."""

import gc
import os
import tempfile

import pytest

from upslope.errors import DataError
from upslope.text import examples
from upslope.text.examples import Example, Examples, Pair, Pairs

MADE = [Example([n, 2**31 - 1, 3][: n % 3 + 1], [True, False, n % 2 == 0][: n % 3 + 1], 7 * n) for n in range(50)]
MADE_PAIRS = [Pair([1] * (n % 4 + 1), [n, 2], n % 2, 0.1 * n) for n in range(50)]


@pytest.mark.parametrize("kept", [0, 40, 1 << 24])
def test_what_is_put_in_comes_out(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(examples, "KEPT_BYTES", kept)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for packed, made in ((Examples(), MADE), (Pairs(), MADE_PAIRS)):
        for n, item in enumerate(made):
            packed.append(item)
            assert packed[n] == item and packed[n // 2] == made[n // 2]  # also between two appends
        assert len(packed) == 50 and list(packed) == made
        assert packed[-1] == made[-1] and packed[3:9] == made[3:9] and packed[:0] == []
        with pytest.raises(IndexError):
            packed[50]
    assert MADE[0] == Example([0], [True], 0) and not list(tmp_path.iterdir())


def test_the_file_goes_with_the_examples(monkeypatch):
    monkeypatch.setattr(examples, "KEPT_BYTES", 0)
    before = len(os.listdir("/proc/self/fd"))
    packed = Examples()
    packed.append(MADE[0])
    assert packed[0] == MADE[0] and len(os.listdir("/proc/self/fd")) > before
    del packed
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_refuses_the_tokens_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "KEPT_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"cannot keep tokens in .*missing: .*; free space or set TMPDIR"):
        Examples().append(MADE[0])
