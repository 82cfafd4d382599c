"""Element-wise operations with backward passes that read memory as few times as they can."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.kernels.serving import serving


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32, returned in the dtype of x.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467). Keeps x and one number a row;
    on a CPU the composed operation is three times slower there and back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        kernels = serving(x)
        if kernels is not None:
            out, scale = kernels.norm(x.contiguous(), weight.float(), eps)
            ctx.save_for_backward(x, weight, scale.unsqueeze(-1))
            return out
        x32 = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(torch.linalg.vecdot(x32, x32).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dx = s (g - n mean(g n)), n = x s, g = dy weight;   dweight = sum over rows of dy n."""
        x, weight, scale = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        if torch.is_grad_enabled():  # differentiated again: nothing in place, and the scale is seen to come from x
            wide, grad = x.to(dtype), grads[0].to(dtype)
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
            normal, pulled = wide * scale, grad * weight
            grad_x = (pulled - normal * (pulled * normal).mean(-1, keepdim=True)) * scale
            return grad_x.to(x.dtype), (grad * normal).sum(0).to(weight.dtype), None
        kernels = serving(x, grads[0])
        if kernels is not None:
            by_x, by_weight = kernels.norm_backward(x.contiguous(), grads[0].contiguous(), weight.float(), scale)
            return by_x, by_weight.to(weight.dtype), None
        grad = grads[0].to(dtype)
        normal = x.to(dtype) * scale
        grad_weight = torch.linalg.vecdot(grad, normal, dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        share = torch.linalg.vecdot(grad, normal).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = grad.addcmul_(normal, share, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class SwiGLU(torch.autograd.Function):
    """y = (silu(gate) * up) W^T, keeping only gate and up: what the product is of is made again for its gradient.

    Shazeer 2020, "GLU Variants" (arXiv 2002.05202). gate and up (N, F), W (D, F) -> (N, D).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(_gated(gate, up), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """da = dy W, dW = dy^T a; dgate = da up s (1 + gate (1 - s)),  dup = da gate s,  s = sigmoid(gate)."""
        gate, up, weight = ctx.saved_tensors
        grad = grads[0]
        grad_weight = grad.t() @ _gated(gate, up) if ctx.needs_input_grad[2] else None
        grad = grad @ weight
        if torch.is_grad_enabled():  # differentiated again: silu_backward has no derivative of its own
            slope = torch.sigmoid(gate)
            return grad * up * slope * (1 + gate * (1 - slope)), F.silu(gate) * grad, grad_weight
        kernels = _rows(gate, up, grad)
        if kernels is not None:
            return *kernels.swiglu_backward(gate, up, grad), grad_weight
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad), grad_weight


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    kernels = _rows(gate, up)
    mixed: Tensor = F.silu(gate).mul_(up) if kernels is None else kernels.swiglu(gate, up)
    return mixed


def _rows(*tensors: Tensor) -> ModuleType | None:
    """The kernels that serve these, where they are rows one behind the other."""
    return serving(*tensors) if tensors[0].ndim == 2 and all(t.is_contiguous() for t in tensors) else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves convention: x (..., heads, d), cos and sin (..., 1, d/2), in the dtype of x.

    (a, b) -> (a cos - b sin, b cos + a sin). Su et al. 2021 (arXiv 2104.09864).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
