"""From logits to one token a row, with one uniform number each.

The inverse of the cumulative distribution is found in two levels, sums of blocks and then inside one block: this
reads the vocabulary once and draws no number per entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upslope.algo import kept_tokens
from upslope.kernels import cpu

BLOCK = 256


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    uniform_S: Tensor,
    top_k: list[int],
    top_p: list[float],
    valid: int | None,
    mask_SV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(id_S, logp_S): one token a row, and its log-probability under the very distribution it was drawn from."""
    vocabulary = logits_SV.shape[1]
    if cpu.serve(logits_SV) and not _cut_rows(top_k, top_p, vocabulary):
        return cpu.choose(
            logits_SV.contiguous(), temperature_S, uniform_S.double(), min(valid or vocabulary, vocabulary)
        )
    logp_SV = log_distribution(logits_SV, temperature_S, top_k, top_p, valid, mask_SV)
    return choose(logp_SV, uniform_S, temperature_S == 0)


def _cut_rows(top_k: list[int], top_p: list[float], vocabulary: int) -> list[int]:
    return [row for row, (k, p) in enumerate(zip(top_k, top_p, strict=True)) if 0 < k < vocabulary or p < 1]


def log_distribution(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k: list[int],
    top_p: list[float],
    valid: int | None,
    mask_SV: Tensor | None = None,
) -> Tensor:
    """log p_SV in fp32 of the distribution to sample from: tempered, cut to top-k and top-p, normalised again.

    temperature 0 leaves the distribution itself (its rows take the most probable token). Entries from `valid` on are
    padding of the vocabulary: never sampled. mask_SV: logits of another model, whose distribution says what is cut.
    """
    logp_SV = _tempered(logits_SV, temperature_S, valid)
    cut = _cut_rows(top_k, top_p, logp_SV.shape[1])
    if cut:
        rows = torch.tensor(cut, device=logp_SV.device)
        by_SV = logp_SV if mask_SV is None else _tempered(mask_SV, temperature_S, valid)
        k_S = torch.tensor([top_k[row] for row in cut], device=logp_SV.device)
        p_S = torch.tensor([top_p[row] for row in cut], device=logp_SV.device)
        kept = kept_tokens(by_SV[rows], k_S, p_S)
        logp_SV[rows] = torch.log_softmax(logp_SV[rows].masked_fill(~kept, float("-inf")), dim=-1)
    return logp_SV


def _tempered(logits_SV: Tensor, temperature_S: Tensor, valid: int | None) -> Tensor:
    logits_SV = logits_SV.float()
    if valid is not None and valid < logits_SV.shape[1]:
        logits_SV[:, valid:] = float("-inf")
    if bool((temperature_S != 1).any()):
        logits_SV = logits_SV / torch.where(temperature_S == 0, 1.0, temperature_S)[:, None]
    return torch.log_softmax(logits_SV, dim=-1)


def choose(logp_SV: Tensor, uniform_S: Tensor, greedy_S: Tensor) -> tuple[Tensor, Tensor]:
    """(id_S, logp_S): the token at which the cumulative distribution passes the row's uniform number.

    A token of probability 0 is never chosen: where rounding leads past the end, the last possible one is taken.
    """
    rows, vocabulary = logp_SV.shape
    width = -vocabulary % BLOCK
    p_SV = torch.nn.functional.pad(logp_SV, (0, width), value=float("-inf")).exp_() if width else logp_SV.exp()
    blocks = p_SV.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double().cumsum(-1)
    goal = uniform_S.double()[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, goal, right=True).clamp_max(sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).double().cumsum(-1)
    offset = torch.searchsorted(inside, goal - before, right=True).clamp_max(BLOCK - 1)
    ids_S = (block * BLOCK + offset).squeeze(1)
    impossible = p_SV.gather(1, ids_S[:, None]).squeeze(1) == 0
    if bool(impossible.any()):
        possible = (p_SV > 0) & (torch.arange(p_SV.shape[1], device=p_SV.device) <= ids_S[:, None])
        last = p_SV.shape[1] - 1 - possible.flip(1).to(torch.uint8).argmax(1)
        ids_S = torch.where(impossible, torch.where(possible.any(1), last, logp_SV.argmax(-1)), ids_S)
    if bool(greedy_S.any()):
        ids_S = torch.where(greedy_S, logp_SV.argmax(-1), ids_S)
    return ids_S, logp_SV.gather(1, ids_S[:, None]).squeeze(1)
