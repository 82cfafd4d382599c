"""Log-probabilities of chosen tokens through a projection that is never held whole."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 256  # rows of logits at once: 50 MB in fp32 at a vocabulary of 49,152


def token_logprobs(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(logp_N, entropy_N) of softmax(hidden weight^T / temperature), both differentiable, in fp32 or wider.

        logp_n = z_n[target_n] - log sum exp z_n,   H_n = -sum_v p_nv log p_nv,   z = hidden weight^T / temperature

    Products are in the dtype of hidden_ND, the softmax in fp32. Rows are computed `chunk` at a time, forwards and,
    again, backwards: no N x V tensor ever exists. Raises ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden_ND, weight_VD, target_N, temperature, chunk)
    return found


def _log_softmax(hidden_ND: Tensor, weight_DV: Tensor, temperature: float) -> Tensor:
    logits_NV = (hidden_ND @ weight_DV).to(torch.promote_types(hidden_ND.dtype, torch.float32))
    if temperature != 1.0:
        logits_NV /= temperature
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
        entropy_N = torch.empty_like(logp_N)
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            logp_nV = _log_softmax(hidden_ND[rows], weight_DV, temperature)
            logp_N[rows] = logp_nV.gather(1, target_N[rows, None]).squeeze(1)
            entropy_N[rows] = -torch.bmm(logp_nV.exp()[:, None], logp_nV[:, :, None]).view(-1)  # no product is stored
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, entropy_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """dlogp/dz = onehot - p;  dH/dz_v = -p_v (log p_v + H)."""
        grad_logp_N, grad_entropy_N = grads
        hidden_ND, weight_VD, target_N, entropy_N = ctx.saved_tensors
        if grad_logp_N is None and grad_entropy_N is None:
            return None, None, None, None, None
        weight_cast = weight_VD.to(hidden_ND.dtype)
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(weight_VD.dtype, torch.float32)  # a bf16 sum over chunks would lose digits
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logp_nV = _log_softmax(hidden_ND[rows], weight_cast.t(), ctx.temperature)
            if grad_entropy_N is not None:
                p_nV = logp_nV.exp()
                gain_nV = -p_nV * (logp_nV + entropy_N[rows, None]) * grad_entropy_N[rows, None]
                if grad_logp_N is not None:
                    gain_nV -= p_nV * grad_logp_N[rows, None]
            else:
                assert grad_logp_N is not None
                pull_n1 = -grad_logp_N[rows, None]
                # in place, except where this backward is itself differentiated
                gain_nV = logp_nV.exp() * pull_n1 if torch.is_grad_enabled() else logp_nV.exp_().mul_(pull_n1)
            if grad_logp_N is not None:
                gain_nV.scatter_add_(1, target_N[rows, None], grad_logp_N[rows, None].to(gain_nV.dtype))
            if ctx.temperature != 1.0:
                gain_nV /= ctx.temperature
            gain_nV = gain_nV.to(hidden_ND.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = gain_nV @ weight_cast
            if grad_weight is not None:
                grad_weight += gain_nV.t() @ hidden_ND[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None, None
