"""Which kernels serve some tensors: those for the CPU, those for a GPU, or none (torch's own operations then)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from upslope.kernels import cpu, gpu


def serving(*tensors: Tensor) -> ModuleType | None:
    """cpu or gpu, whose functions have the same names and meanings where both have them; None where neither serves."""
    if cpu.serve(*tensors):
        return cpu
    return gpu if gpu.serve(*tensors) else None
