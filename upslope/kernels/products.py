"""Products with weights that stay as they are for a while: laid out once, not anew by every product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 8  # a bf16 product of fewer rows with a weight in plain layout falls into a slow path on CPUs


class Product:
    """x W^T + bias for a weight without gradients. On the CPU in bf16 the weight stands in the blocked layout that
    oneDNN computes with, which the plain product makes anew each time; the results are the same bits."""

    def __init__(self, *parts: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weight = torch.empty(0)
        self.packed = False
        self.load(*parts)

    def load(self, *parts: Tensor) -> None:
        """Take over new values: the rows of the parts one after the other."""
        with torch.no_grad():
            joined = torch.cat([p.detach().to(self.dtype) for p in parts]) if len(parts) > 1 else parts[0].detach()
            joined = joined.to(self.dtype, copy=joined is parts[0] or len(parts) == 1)
            self.packed = can_pack(joined)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(joined) if self.packed else joined

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
            return out
        rows = len(x)
        if rows < MIN_ROWS and x.device.type == "cpu":
            return F.linear(F.pad(x, (0, 0, 0, MIN_ROWS - rows)), self.weight, bias)[:rows]
        return F.linear(x, self.weight, bias)

    def dense(self) -> Tensor:
        """The weight in plain layout."""
        return self.weight.to_dense() if self.packed else self.weight


def can_pack(weight: Tensor) -> bool:
    """Whether torch's operators for weights in blocked layout are there and serve this one."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(torch.ops.mkldnn, o) for o in operators) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
