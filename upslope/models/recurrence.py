"""The recurrence of an LSTM layer over a ragged batch, and its gradient. Time runs in here and nowhere else.

The sequences that have a token at time t are computed together, the longest first, so that those that have ended leave
at the end of the block: no pad is ever computed. Sequences with a parent come after all others, from its last state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.ragged import Ragged


@dataclass(frozen=True)
class Steps:
    """Some sequences of a batch in the order of time.

    sizes[t]: how many of them have a token t; token_M: the place in the batch of each of their tokens, time by time;
    before_R: the place of the token whose state each begins with (the parent's last), -1 for an empty state.
    """

    sizes: list[int]
    token_M: Tensor
    before_R: Tensor


def in_order_of_time(batch: Ragged, device: torch.device) -> list[Steps]:
    """The sequences without a parent, then those with one."""
    first = [b for b, p in enumerate(batch.parent) if p < 0]
    then = [b for b, p in enumerate(batch.parent) if p >= 0]
    return [_steps(batch, rows, device) for rows in (first, then) if any(batch.lengths[b] for b in rows)]


def _steps(batch: Ragged, rows: Sequence[int], device: torch.device) -> Steps:
    rows = sorted((b for b in rows if batch.lengths[b]), key=lambda b: -batch.lengths[b])
    time = torch.arange(batch.lengths[rows[0]])[:, None]
    alive = time < torch.tensor([batch.lengths[b] for b in rows])
    start_R = torch.tensor([batch.starts[b] for b in rows])
    before_R = batch.previous[start_R]
    return Steps(alive.sum(1).tolist(), (start_R + time)[alive].to(device), before_R.to(device))


def recur(pre: Tensor, recurrent: Tensor, steps: Sequence[Steps]) -> tuple[Tensor, Tensor]:
    """h_ND and c_ND after every token, from pre (N x 4D), what reaches the gates from below.

    recurrent: 4D x D, in the dtype of products; states are in the dtype of pre.
    """
    width = pre.shape[1] // 4
    h_ND, c_ND = (pre.new_zeros(len(pre), width) for _ in range(2))
    for part in steps:
        begins = (part.before_R >= 0)[:, None]
        h, c = (state[part.before_R.clamp(min=0)] * begins for state in (h_ND, c_ND))
        h_M, c_M = Recurrence.apply(pre[part.token_M], recurrent, h, c, part.sizes)
        h_ND, c_ND = h_ND.index_copy(0, part.token_M, h_M), c_ND.index_copy(0, part.token_M, c_M)
    return h_ND, c_ND


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One moment: (the gates behind their nonlinearities, c, h)."""
    i, f, g, o = gates.chunk(4, dim=-1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    return torch.cat((i, f, g, o), dim=-1), c, o * torch.tanh(c)


def unrolled(
    pre: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(h_M, c_M, gates_M): the recurrence as it is written down, whose derivatives autograd can take, of any order."""
    found: list[tuple[Tensor, ...]] = []
    for size, part in zip(sizes, pre.split(list(sizes)), strict=True):
        product = F.linear(h[:size].to(recurrent.dtype), recurrent).to(pre.dtype)
        gates, c, h = cell(part + product, c[:size])
        found.append((h, c, gates))
    h_M, c_M, gates_M = (torch.cat(parts) for parts in zip(*found, strict=True))
    return h_M, c_M, gates_M


class Recurrence(torch.autograd.Function):
    """The recurrence with a gradient of its own: weights get theirs in one product over all tokens, not one a moment.

    Where it is to be differentiated again (TRPO), autograd does it.
    """

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        h_M, c_M, gates_M = unrolled(pre, recurrent, h, c, sizes)
        ctx.sizes = sizes
        ctx.save_for_backward(pre, recurrent, h, c, h_M, c_M, gates_M)
        return h_M, c_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With a = gates before their nonlinearities:

        dc_t += dh_t o (1 - tanh(c_t)^2),   dc_(t-1) = f dc_t,   dh_(t-1) += U^T da_t
        da = (dc g i (1 - i), dc c_(t-1) f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o)),   dU = sum da h_(t-1)^T
        """
        pre, recurrent, h, c, h_M, c_M, gates_M = ctx.saved_tensors
        sizes = ctx.sizes
        if torch.is_grad_enabled():
            # views, so that a parent's states lead no further back: they have this function's gradient of their own
            inputs = [x.view_as(x) for x in (pre, recurrent, h, c)]
            wanted = [x for x in inputs if x.requires_grad]
            outputs = unrolled(inputs[0], inputs[1], inputs[2], inputs[3], sizes)[:2]
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
            return (*(next(found) if x.requires_grad else None for x in inputs), None)
        before_M = _before(h, h_M, sizes)
        cells_M = _before(c, c_M, sizes)
        i, f, g, o = gates_M.chunk(4, dim=-1)
        tanh_M = torch.tanh(c_M)
        # of each gate, what its share of the two gradients is multiplied by
        of_c = torch.cat((g * i * (1 - i), cells_M * f * (1 - f), i * (1 - g * g)), dim=-1)
        of_h, into_c = tanh_M * o * (1 - o), o * (1 - tanh_M * tanh_M)
        da = torch.empty_like(gates_M)
        width = h.shape[1]
        dh, dc = torch.zeros_like(h), torch.zeros_like(c)
        end = len(pre)
        for size in reversed(sizes):
            rows = slice(end - size, end)
            dh[:size] += grads[0][rows]
            dc[:size] += grads[1][rows] + dh[:size] * into_c[rows]
            torch.mul(dc[:size].repeat(1, 3), of_c[rows], out=da[rows, : 3 * width])
            torch.mul(dh[:size], of_h[rows], out=da[rows, 3 * width :])
            dh[:size] = (da[rows].to(recurrent.dtype) @ recurrent).to(dh.dtype)
            dc[:size] *= f[rows]
            end -= size
        weight = da.to(recurrent.dtype).t() @ before_M.to(recurrent.dtype) if ctx.needs_input_grad[1] else None
        return da, weight, dh, dc, None


def _before(first: Tensor, state_M: Tensor, sizes: Sequence[int]) -> Tensor:
    """The state before each token, in the order of time."""
    parts = [first, *state_M.split(list(sizes))]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=False)])
