"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from upslope.kernels.allocator import keep_freed_memory
if {keep}: assert keep_freed_memory()
for _ in range(40): torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
    code = [sys.executable, "-c", CODE.format(keep=keep)]
    return int(subprocess.run(code, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked")
def test_a_tensor_takes_the_place_of_a_freed_one() -> None:
    assert page_faults(keep=True) < 100 < page_faults(keep=False)
