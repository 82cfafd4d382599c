"""Attention that looks at the whole of another sequence, or at both sides of its own; and a bias on any attention.

Padding exists in here and in attention.py, and nowhere else.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.models.attention import PLAIN_KEYS


class Places(Protocol):
    """Where tokens stand in the padded tensors of a kernel: attention.Layout, or Whole."""

    queries: int
    keys: int

    @property
    def mask(self) -> Tensor | None: ...
    def pad_queries(self, x: Tensor) -> Tensor: ...
    def pad_keys(self, x: Tensor) -> Tensor: ...
    def unpad(self, x: Tensor) -> Tensor: ...


class Whole:
    """Rows of queries that see whole rows of keys: no order among them, and nothing of another row.

    query_row_N and key_row_M say to which of the rows a token belongs, in any order. A row of queries without keys
    would have nothing to look at: its caller sees to that.
    """

    def __init__(self, query_row_N: Tensor, key_row_M: Tensor, rows: int, device: torch.device) -> None:
        self.rows = rows
        query_place, self.queries, _ = _places(query_row_N, rows)
        key_place, self.keys, lengths = _places(key_row_M, rows)
        self.query_place, self.key_place = query_place.to(device), key_place.to(device)
        allowed = torch.arange(self.keys) < lengths[:, None]
        self.mask = None if bool(allowed.all()) else allowed[:, None, None].to(device)

    def pad_queries(self, x: Tensor) -> Tensor:
        """(N, heads, d) -> (rows, heads, queries, d), zeros where nothing is real."""
        return self._pad(x, self.query_place, self.queries)

    def pad_keys(self, x: Tensor) -> Tensor:
        """(M, heads, d) -> (rows, heads, keys, d)."""
        return self._pad(x, self.key_place, self.keys)

    def unpad(self, x: Tensor) -> Tensor:
        """(rows, heads, queries, d) -> (N, heads, d)."""
        return x.transpose(1, 2).reshape(self.rows * self.queries, x.shape[1], x.shape[3])[self.query_place]

    def _pad(self, x: Tensor, place: Tensor, width: int) -> Tensor:
        flat = x.new_zeros(self.rows * width, *x.shape[1:]).index_copy(0, place, x)
        return flat.view(self.rows, width, *x.shape[1:]).transpose(1, 2)


def _places(row_N: Tensor, rows: int) -> tuple[Tensor, int, Tensor]:
    """(place of each token in rows x width, width, tokens of each row)."""
    lengths = torch.bincount(row_N, minlength=rows)
    width = int(lengths.max()) if rows else 0
    order = torch.argsort(row_N, stable=True)
    column = torch.empty_like(row_N)
    column[order] = torch.arange(len(row_N)) - (lengths.cumsum(0) - lengths)[row_N[order]]
    return row_N * width + column, width, lengths


def attend_biased(q: Tensor, k: Tensor, v: Tensor, places: Places, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v where the layout allows it: q (N, heads, d), k and v (M, heads, d) -> as q.

    bias (rows or 1, heads, queries, keys) is added in fp32. The plain product has a second derivative and a fast
    backward pass on a CPU; beyond PLAIN_KEYS keys memory decides, and the fused kernel computes it.
    """
    if places.queries == 0:
        return q
    pq, pk, pv = places.pad_queries(q), places.pad_keys(k), places.pad_keys(v)
    mask = places.mask
    if places.keys > PLAIN_KEYS or q.device.type != "cpu":
        if bias is not None:
            bias = bias.to(q.dtype)
            mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
        return places.unpad(F.scaled_dot_product_attention(pq, pk, pv, attn_mask=mask, scale=scale))
    scores = (pq @ pk.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return places.unpad(torch.softmax(scores, dim=-1).to(q.dtype) @ pv)


def distance_buckets(distance: Tensor, buckets: int, max_distance: int, *, both_sides: bool) -> Tensor:
    """The bucket of each distance (key's place - query's place), as T5 shares them.

    Half of the buckets hold one distance each, the others grow with its logarithm up to max_distance; both_sides
    gives keys behind the query buckets of their own, else they count as distance 0.
    Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (arXiv 1910.10683), section 2.1.
    """
    if both_sides:
        buckets //= 2
        side = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        side = torch.zeros_like(distance)
        distance = (-distance).clamp_min(0)
    exact = buckets // 2
    growth = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + growth.long()).clamp_max(buckets - 1)
    return side + torch.where(distance < exact, distance, far)
