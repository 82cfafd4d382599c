"""Log-probabilities of chosen tokens through a projection that is never held whole."""

import itertools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upslope.kernels import cpu
from upslope.kernels.serving import serving

CHUNK_BYTES = 16 << 20  # of logits at once, in the dtype of products
KEPT_BYTES = 80 << 20  # logits that fit in this altogether are kept for the backward pass instead of being made again
ROWS = 8192  # rows that are gone through the vocabulary with at once, backwards
SLICE = 8192  # entries of the vocabulary whose gradient is made at once, at most


def token_logprobs(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(logp_N, entropy_N) of softmax(hidden weight^T / temperature), both differentiable, in fp32 or wider.

        logp_n = z_n[target_n] - log sum exp z_n,   H_n = -sum_v p_nv log p_nv,   z = hidden weight^T / temperature

    Products are in the dtype of hidden_ND, the softmax in fp32. Rows are computed `chunk` at a time (default: what
    fits some megabytes), forwards and, unless all fit in some more, again backwards: the memory does not grow with
    N x V. Raises ValueError for a temperature that is not positive and for targets that are no tokens.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    target_N = target_N.to(torch.int64).contiguous()
    if cpu.serve(hidden_ND):  # they read where they are told to
        low, high = (int(target_N.min()), int(target_N.max())) if len(target_N) else (0, 0)
        if low < 0 or high >= len(weight_VD) or len(target_N) != len(hidden_ND):
            shape = f"{len(hidden_ND)} states, {len(weight_VD)} tokens"
            raise ValueError(f"{len(target_N)} targets from {low} to {high} for {shape}")
    if chunk is None:
        chunk = max(16, _room(hidden_ND.device)[0] // (len(weight_VD) * hidden_ND.element_size()))
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden_ND, weight_VD, target_N, temperature, chunk)
    return found


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    return torch.log_softmax(logits_NV, dim=-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight_DV = weight_VD.to(hidden_ND.dtype).t()
        logp_N = hidden_ND.new_empty(len(hidden_ND), dtype=dtype)
        entropy_N, norm_N = torch.empty_like(logp_N), torch.empty_like(logp_N)
        kernels = serving(hidden_ND)
        bytes_of_all = len(hidden_ND) * len(weight_VD) * hidden_ND.element_size()
        keep = kernels and any(ctx.needs_input_grad) and bytes_of_all <= _room(hidden_ND.device)[1]
        ctx.kept = hidden_ND.new_empty(len(hidden_ND), len(weight_VD)) if keep else None
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            logits_nV = torch.mm(hidden_ND[rows], weight_DV, out=None if ctx.kept is None else ctx.kept[rows])
            if kernels is not None:
                found = kernels.token_stats(logits_nV, target_N[rows], temperature)
                logp_N[rows], entropy_N[rows], norm_N[rows] = found
                del logits_nV  # before the next chunk's
                continue
            logp_nV = _log_softmax(logits_nV, temperature)
            logp_N[rows] = logp_nV.gather(1, target_N[rows, None]).squeeze(1)
            entropy_N[rows] = -torch.bmm(logp_nV.exp()[:, None], logp_nV[:, :, None]).view(-1)  # no product is stored
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, entropy_N, norm_N)
        ctx.temperature, ctx.chunk, ctx.kernels = temperature, chunk, kernels
        ctx.weight_dtype = weight_VD.dtype
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """dlogp/dz = onehot - p;  dH/dz_v = -p_v (log p_v + H)."""
        if all(g is None for g in grads):
            return None, None, None, None, None
        hidden_ND, weight_VD, target_N, entropy_N, norm_N = ctx.saved_tensors
        wide = torch.promote_types(weight_VD.dtype, torch.float32)  # a bf16 sum over chunks would lose digits
        grad_hidden = torch.zeros_like(hidden_ND, dtype=wide) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        kernels = None if torch.is_grad_enabled() else ctx.kernels  # else this backward is itself differentiated
        kept = None
        if kernels is not None:  # their gradient takes their place: another backward pass makes them again
            kept, ctx.kept = ctx.kept, None
        tokens, vocabulary = len(hidden_ND), len(weight_VD)
        size, width = ctx.chunk, vocabulary
        if kept is not None:
            size = tokens
        elif kernels is cpu:
            size, width = _part(tokens, vocabulary, hidden_ND.element_size())
        if width == vocabulary:  # every part has all of the weight: cast once
            weight_VD = weight_VD.to(hidden_ND.dtype)
        parts = itertools.product(_slices(tokens, size), _slices(vocabulary, width))
        for rows, entries in parts:
            hidden_nD, weight_vD = hidden_ND[rows], weight_VD[entries].to(hidden_ND.dtype)
            pulls = [None if g is None else g[rows].contiguous() for g in grads]
            if kernels is not None:
                logits_nv = hidden_nD @ weight_vD.t() if kept is None else kept
                known = (target_N[rows], entropy_N[rows], norm_N[rows], *pulls, ctx.temperature, entries.start)
                gain_nv = kernels.token_gradient_(logits_nv, *known)
            else:
                logp_nv = _log_softmax(hidden_nD @ weight_vD.t(), ctx.temperature)
                gain_nv = _gain(logp_nv, target_N[rows], entropy_N[rows], *pulls)
                gain_nv = (gain_nv / ctx.temperature).to(hidden_ND.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] += gain_nv @ weight_vD
            if grad_weight is not None:
                for some in _slices(gain_nv.shape[1], SLICE):
                    place = slice(entries.start + some.start, entries.start + some.stop)
                    grad_weight[place] += gain_nv[:, some].t() @ hidden_nD
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden_ND.dtype)
        grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _room(device: torch.device) -> tuple[int, int]:
    """Bytes of logits at once, and bytes up to which all are kept for the backward pass; shares of a GPU's memory."""
    if device.type != "cuda":
        return CHUNK_BYTES, KEPT_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return memory // 64, memory // 16


def _part(tokens: int, vocabulary: int, number_bytes: int) -> tuple[int, int]:
    """Rows and entries of the vocabulary to go backwards through together, where the norms of the softmax are known.

    A part of the vocabulary is then enough for many rows: its gradient is summed over them at once.
    """
    rows = max(1, min(tokens, ROWS))
    return rows, min(vocabulary, SLICE, max(64, CHUNK_BYTES // (rows * number_bytes)))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, max(1, size))]


def _gain(
    logp_nV: Tensor, target_n: Tensor, entropy_n: Tensor, logp_pull: Tensor | None, entropy_pull: Tensor | None
) -> Tensor:
    """What the loss gains by each tempered logit."""
    if entropy_pull is None:
        assert logp_pull is not None
        pull_n1 = -logp_pull[:, None]
        gain_nV = logp_nV.exp() * pull_n1 if torch.is_grad_enabled() else logp_nV.exp_().mul_(pull_n1)
    else:
        p_nV = logp_nV.exp()
        gain_nV = -p_nV * (logp_nV + entropy_n[:, None]) * entropy_pull[:, None]
        if logp_pull is not None:
            gain_nV -= p_nV * logp_pull[:, None]
    if logp_pull is not None:
        gain_nV.scatter_add_(1, target_n[:, None], logp_pull[:, None].to(gain_nV.dtype))
    return gain_nV
