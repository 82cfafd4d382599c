"""Causal attention over a ragged batch. Padding exists in here and nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.ragged import Ragged

PLAIN_KEYS = 256  # up to here the plain product has the faster backward pass on a CPU; beyond, memory decides


class Layout:
    """Where the tokens of a ragged batch stand in the padded tensors of the kernel; made once a forward pass.

    A query row is a sequence's own tokens; a key row is its parent's tokens followed by its own. Pads stand behind
    what is real, so that a causal mask keeps real queries from them; their own outputs are never read.
    """

    def __init__(self, batch: Ragged, device: torch.device, window: int | None) -> None:
        lengths = torch.tensor(batch.lengths)
        prefixes = torch.tensor(batch.prefix_lengths)
        starts = torch.tensor(batch.starts[:-1])
        self.sequences = len(batch)
        self.queries = int(lengths.max()) if len(batch) else 0
        self.keys = int((lengths + prefixes).max()) if len(batch) else 0
        self.parents = batch.has_parents
        rows = torch.arange(len(batch)).repeat_interleave(lengths)
        column = torch.arange(batch.tokens) - starts.repeat_interleave(lengths)
        self.query_place = (rows * self.queries + column).to(device)  # N -> B x queries
        own = rows * self.keys + column + prefixes.repeat_interleave(lengths)
        if self.parents:
            parent_starts = torch.tensor([batch.starts[p] if p >= 0 else 0 for p in batch.parent])
            parent_rows = torch.arange(len(batch)).repeat_interleave(prefixes)
            offset = torch.arange(len(parent_rows)) - (prefixes.cumsum(0) - prefixes).repeat_interleave(prefixes)
            source = parent_starts.repeat_interleave(prefixes) + offset
            self.key_place = torch.cat((own, parent_rows * self.keys + offset)).to(device)
            self.key_source: Tensor | None = torch.cat((torch.arange(batch.tokens), source)).to(device)
        else:
            self.key_place, self.key_source = own.to(device), None
        self.mask = self._mask(prefixes, window, device)

    def _mask(self, prefixes: Tensor, window: int | None, device: torch.device) -> Tensor | None:
        """True where a query may look: (B or 1, 1, queries, keys); None when plain causality says it all."""
        plain = not self.parents and (window is None or window >= self.keys)
        if plain and self.keys > PLAIN_KEYS:
            return None
        query = torch.arange(self.queries)[None, :, None]
        if self.parents:
            query = query + prefixes[:, None, None]
        key = torch.arange(self.keys)[None, None, :]
        allowed = key <= query
        if window is not None:
            allowed = allowed & (key > query - window)
        return allowed[:, None].to(device)

    def pad_queries(self, x: Tensor) -> Tensor:
        """(N, heads, d) -> (B, heads, queries, d), zeros where nothing is real."""
        flat = x.new_zeros(self.sequences * self.queries, *x.shape[1:]).index_copy(0, self.query_place, x)
        return flat.view(self.sequences, self.queries, *x.shape[1:]).transpose(1, 2)

    def pad_keys(self, x: Tensor) -> Tensor:
        """(N, heads, d) -> (B, heads, keys, d), a parent's tokens in front of its children's."""
        x = x if self.key_source is None else x[self.key_source]
        flat = x.new_zeros(self.sequences * self.keys, *x.shape[1:]).index_copy(0, self.key_place, x)
        return flat.view(self.sequences, self.keys, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, heads, queries, d) -> (N, heads, d)."""
        return x.transpose(1, 2).reshape(self.sequences * self.queries, x.shape[1], x.shape[3])[self.query_place]


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal and within each sequence: q (N, heads, d), k and v (N, kv heads, d) -> as q.

    Several query heads share a key head where there are fewer of those (Ainslie et al. 2023, arXiv 2305.13245).
    """
    if layout.queries == 0:
        return q
    pq, pk, pv = layout.pad_queries(q), layout.pad_keys(k), layout.pad_keys(v)
    plain = layout.keys <= PLAIN_KEYS and q.device.type == "cpu"
    out = _plain(pq, pk, pv, layout) if plain and layout.mask is not None else _fused(pq, pk, pv, layout)
    return layout.unpad(out)


def _plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    sequences, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(sequences, kv_heads, heads // kv_heads * queries, width)
    scores = (grouped @ k.transpose(-1, -2)).view(sequences, heads, queries, keys)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * width**-0.5
    assert layout.mask is not None
    weights = torch.softmax(scores.masked_fill(~layout.mask, float("-inf")), dim=-1).to(q.dtype)
    return (weights.view(sequences, kv_heads, -1, keys) @ v).view(sequences, heads, queries, width)


def _fused(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=layout.mask, is_causal=layout.mask is None, enable_gqa=k.shape[1] != q.shape[1]
    )
