"""Whole distributions over the vocabulary, a chunk of rows at a time: the exact KL, and what a cut leaves of one."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 256  # rows of logits at once, as in logprobs.py
NEVER = -1e30  # a logit that is cut: its probability is 0, and 0 times its logarithm is 0 and not nan


def token_kl(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    ref_hidden_ND: Float[Tensor, "N E"],
    ref_weight_VD: Float[Tensor, "V E"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Float[Tensor, " N"]:
    """The exact KL(policy, reference) of each state, over the whole vocabulary; differentiable in the policy, twice.

        KL_n = sum_v p_nv (log p_nv - log q_nv),   p = softmax(hidden weight^T / temperature),   q likewise, detached

    No N x V tensor exists, forwards or backwards. Raises ValueError for a temperature that is not positive or two
    vocabularies of different sizes.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    if len(weight_VD) != len(ref_weight_VD):
        raise ValueError(f"vocabularies of {len(weight_VD)} and {len(ref_weight_VD)} tokens have no KL")
    ref_hidden_ND, ref_weight_VD = ref_hidden_ND.detach(), ref_weight_VD.detach()

    def divergence(rows: slice, logits_nV: Tensor) -> tuple[Tensor, ...]:
        logp_nV = torch.log_softmax(logits_nV / temperature, dim=-1)
        with torch.no_grad():
            other_nV = torch.log_softmax(_logits(ref_hidden_ND[rows], ref_weight_VD) / temperature, dim=-1)
        return ((logp_nV.exp() * (logp_nV - other_nV)).sum(-1),)

    found: tuple[Tensor, ...] = _Projected.apply(hidden_ND, weight_VD, divergence, 1, chunk)
    return found[0]


def cut_logprobs(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, " N"],
    cut_hidden_ND: Float[Tensor, "N E"],
    cut_weight_VD: Float[Tensor, "V E"],
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(logp_N, entropy_N) of the policy among the tokens that another distribution keeps, normalised again.

        p_nv = softmax over {v: v kept by top_k and top_p of softmax(cut_hidden cut_weight^T / temperature)}

    The target is always kept: a sampler whose rounding differs may have kept it at the edge. The cut has no gradient.
    Ramamurthy et al. 2022, NLPO (arXiv 2210.01241). Raises ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    cut_hidden_ND, cut_weight_VD = cut_hidden_ND.detach(), cut_weight_VD.detach()

    def among_kept(rows: slice, logits_nV: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            cut_nV = torch.log_softmax(_logits(cut_hidden_ND[rows], cut_weight_VD) / temperature, dim=-1)
            n = len(cut_nV)
            k_n = torch.full((n,), top_k, device=cut_nV.device)
            kept_nV = kept_tokens(cut_nV, k_n, torch.full((n,), top_p, device=cut_nV.device))
            kept_nV.scatter_(1, target_N[rows, None], True)
        logp_nV = torch.log_softmax((logits_nV / temperature).masked_fill(~kept_nV, NEVER), dim=-1)
        chosen_n = logp_nV.gather(1, target_N[rows, None]).squeeze(1)
        return chosen_n, -(logp_nV.exp() * logp_nV).sum(-1)

    found: tuple[Tensor, ...] = _Projected.apply(hidden_ND, weight_VD, among_kept, 2, chunk)
    return found[0], found[1]


def kept_tokens(
    logp_NV: Float[Tensor, "N V"], top_k_N: Int[Tensor, " N"], top_p_N: Float[Tensor, " N"]
) -> Bool[Tensor, "N V"]:
    """The top_k most probable (0: all) and, of those, the fewest whose mass reaches top_p; ties by lower id first."""
    values_NV, order_NV = torch.sort(logp_NV, dim=-1, descending=True, stable=True)
    place_V = torch.arange(values_NV.shape[1], device=logp_NV.device)
    inside_NV = (place_V < top_k_N[:, None]) | (top_k_N[:, None] == 0)
    mass_NV = torch.softmax(values_NV.masked_fill(~inside_NV, float("-inf")), dim=-1)
    before_NV = mass_NV.cumsum(-1) - mass_NV
    inside_NV &= (before_NV < top_p_N[:, None]) | (top_p_N[:, None] >= 1)
    return torch.empty_like(inside_NV).scatter_(1, order_NV, inside_NV)


def _logits(hidden_nD: Tensor, weight_VD: Tensor) -> Tensor:
    """Products in the dtype of the hidden states, the rest in fp32 or wider."""
    wide = torch.promote_types(hidden_nD.dtype, torch.float32)
    return (hidden_nD @ weight_VD.to(hidden_nD.dtype).t()).to(wide)


class _Projected(torch.autograd.Function):
    """Functions of logits = hidden weight^T, row by row: of_logits(rows, logits_nV) -> `count` tensors over n."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        of_logits: Callable[[slice, Tensor], tuple[Tensor, ...]],
        count: int,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.of_logits, ctx.chunk = of_logits, chunk
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        outputs = tuple(hidden_ND.new_empty(len(hidden_ND), dtype=wide) for _ in range(count))
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            for whole, part in zip(outputs, of_logits(rows, _logits(hidden_ND[rows], weight_VD)), strict=True):
                whole[rows] = part
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if all(g is None for g in grads):
            return None, None, None, None, None
        hidden_ND, weight_VD = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # this backward is itself differentiated
        weight_cast = weight_VD.to(hidden_ND.dtype)
        wide = torch.promote_types(weight_VD.dtype, torch.float32)  # a bf16 sum over chunks would lose digits
        hidden_parts, grad_weight = [], None
        for start in range(0, len(hidden_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            with torch.enable_grad():
                logits_nV = _logits(hidden_ND[rows], weight_VD)
                logits_nV = logits_nV if twice else logits_nV.detach().requires_grad_()
                outputs = ctx.of_logits(rows, logits_nV)
                asked = [(out, g[rows]) for out, g in zip(outputs, grads, strict=True) if g is not None]
                values, gains = [out for out, _ in asked], [g for _, g in asked]
                (gain_nV,) = torch.autograd.grad(values, logits_nV, gains, create_graph=twice)
            gain_nV = gain_nV.to(hidden_ND.dtype)
            if ctx.needs_input_grad[0]:
                hidden_parts.append(gain_nV @ weight_cast)
            if ctx.needs_input_grad[1]:
                part = (gain_nV.t() @ hidden_ND[rows]).to(wide)
                grad_weight = part if grad_weight is None else grad_weight + part
        grad_hidden = torch.cat(hidden_parts) if hidden_parts else None
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None, None
