"""Products with weights that stay as they are for a while: laid out once, not anew by every product."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.kernels import cpu

MIN_ROWS = 8  # a bf16 product of fewer rows with a weight in plain layout falls into a slow path on CPUs


def taken(new: Tensor, old: Tensor | None) -> Tensor:
    """new, on a GPU in the place of old where that is as large: what was recorded there reads the same addresses."""
    if old is None or new.device.type == "cpu" or old.shape != new.shape or old.dtype != new.dtype:
        return new
    return old.copy_(new)


Layout = Literal["panels", "blocked", "plain"]


class Product:
    """x W^T + bias for a weight without gradients, in the layout that is fastest here.

    In bf16 on the CPU: panels for the compiled kernel, or oneDNN's blocks where the processor has what makes those
    faster; in any other case the weight as it is. Sums are in fp32; one layout differs from another by rounding.
    """

    def __init__(self, *parts: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weight = torch.empty(0)
        self.layout: Layout = "plain"
        self.load(*parts)

    @torch.no_grad()
    def load(self, *parts: Tensor) -> None:
        """Take over new values: the rows of the parts one after the other."""
        joined = torch.cat([p.detach().to(self.dtype) for p in parts])  # a copy, also of a single part
        self.layout, self.outputs = layout_for(joined), len(joined)
        if self.layout == "panels":
            joined = cpu.panels_of(joined)
        elif self.layout == "blocked":
            joined = torch.ops.mkldnn._reorder_linear_weight(joined)
        self.weight = taken(joined, self.weight)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.layout == "panels":
            return cpu.product(x.contiguous(), self.weight, bias, self.outputs)
        if self.layout == "blocked":
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
            return out
        rows = len(x)
        if rows < MIN_ROWS and x.device.type == "cpu":
            return F.linear(F.pad(x, (0, 0, 0, MIN_ROWS - rows)), self.weight, bias)[:rows]
        return F.linear(x, self.weight, bias)

    def dense(self) -> Tensor:
        """The weight in plain layout."""
        if self.layout == "panels":
            return cpu.rows_of(self.weight, self.outputs)
        return self.weight.to_dense() if self.layout == "blocked" else self.weight


def layout_for(weight: Tensor) -> Layout:
    """How a weight is kept for its products on this machine."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return "plain"
    if cpu.multiplies() and weight.shape[1] % 2 == 0:
        return "panels"
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    known = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, o) for o in operators)
    return "blocked" if known and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "plain"
