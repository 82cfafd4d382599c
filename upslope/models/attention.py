"""Causal attention over a ragged batch. Padding exists in here and nowhere else."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.kernels import cpu
from upslope.models.ops import rotate
from upslope.ragged import Ragged

PLAIN_KEYS = 256  # up to here the plain product has the faster backward pass on a CPU; beyond, memory decides
COMPILED_KEYS = 512  # and up to here the compiled kernels, which keep the weights for the backward pass


class Layout:
    """Where the tokens of a ragged batch stand in the padded tensors of the kernel; made once a forward pass.

    A query row is a sequence's own tokens; a key row is its parent's tokens followed by its own. Pads stand behind
    what is real, so that a causal mask keeps real queries from them; their own outputs are never read.
    """

    def __init__(self, batch: Ragged, device: torch.device, window: int | None) -> None:
        self.batch, self.device, self.window = batch, device, window
        self.sequences = len(batch)
        self.queries = max(batch.lengths, default=0)
        self.keys = max((a + b for a, b in zip(batch.lengths, batch.prefix_lengths, strict=True)), default=0)
        self.parents = batch.has_parents

    @cached_property
    def query_place(self) -> Tensor:
        """N -> B x queries."""
        return (self._rows * self.queries + self._column).to(self.device)

    @cached_property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.batch)).repeat_interleave(torch.tensor(self.batch.lengths))

    @cached_property
    def _column(self) -> Tensor:
        starts = torch.tensor(self.batch.starts[:-1])
        return torch.arange(self.batch.tokens) - starts.repeat_interleave(torch.tensor(self.batch.lengths))

    @cached_property
    def _key_places(self) -> tuple[Tensor, Tensor | None]:
        """The places (B x keys) and the tokens that they are filled from (None: each token once, in order)."""
        batch, prefixes = self.batch, torch.tensor(self.batch.prefix_lengths)
        own = self._rows * self.keys + self._column + prefixes[self._rows]
        if not self.parents:
            return own.to(self.device), None
        parent_starts = torch.tensor([batch.starts[p] if p >= 0 else 0 for p in batch.parent])
        parent_rows = torch.arange(len(batch)).repeat_interleave(prefixes)
        offset = torch.arange(len(parent_rows)) - (prefixes.cumsum(0) - prefixes).repeat_interleave(prefixes)
        source = parent_starts.repeat_interleave(prefixes) + offset
        place = torch.cat((own, parent_rows * self.keys + offset)).to(self.device)
        return place, torch.cat((torch.arange(batch.tokens), source)).to(self.device)

    @cached_property
    def table(self) -> cpu.Table:
        """The same, as the compiled kernels read it."""
        batch = self.batch
        children: list[list[int]] = [[] for _ in range(len(batch))]
        for b, p in enumerate(batch.parent):
            if p >= 0:
                children[p].append(b)
        parent_starts = [batch.starts[p] if p >= 0 else 0 for p in batch.parent]
        rows = list(zip(batch.starts, batch.lengths, parent_starts, batch.prefix_lengths, strict=False))
        first = [0, *itertools.accumulate(len(c) for c in children)]
        flat = [b for c in children for b in c]
        return cpu.Table(*(torch.tensor(t, dtype=torch.int64) for t in (rows, first, flat)))

    @cached_property
    def mask(self) -> Tensor | None:
        """True where a query may look: (B or 1, 1, queries, keys); None when plain causality says it all."""
        prefixes, window = torch.tensor(self.batch.prefix_lengths), self.window
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
        return allowed[:, None].to(self.device)

    def pad_queries(self, x: Tensor) -> Tensor:
        """(N, heads, d) -> (B, heads, queries, d), zeros where nothing is real."""
        flat = x.new_zeros(self.sequences * self.queries, *x.shape[1:]).index_copy(0, self.query_place, x)
        return flat.view(self.sequences, self.queries, *x.shape[1:]).transpose(1, 2)

    def pad_keys(self, x: Tensor) -> Tensor:
        """(N, heads, d) -> (B, heads, keys, d), a parent's tokens in front of its children's."""
        place, source = self._key_places
        x = x if source is None else x[source]
        flat = x.new_zeros(self.sequences * self.keys, *x.shape[1:]).index_copy(0, place, x)
        return flat.view(self.sequences, self.keys, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, heads, queries, d) -> (N, heads, d)."""
        return x.transpose(1, 2).reshape(self.sequences * self.queries, x.shape[1], x.shape[3])[self.query_place]


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal and within each sequence: q (N, heads, d), k and v (N, kv heads, d) -> as q.

    With rope, cos and sin (N, 1, d / 2), queries and keys are turned first. Several query heads share a key head where
    there are fewer of those (Ainslie et al. 2023, arXiv 2305.13245).
    """
    if layout.queries == 0:
        return q
    if layout.keys <= COMPILED_KEYS and cpu.serve(q, k, v):
        cos, sin = (None, None) if rope is None else rope
        compiled: Tensor = _Compiled.apply(q, k, v, cos, sin, layout)
        return compiled
    return _composed(q, k, v, layout, rope)


def _composed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    pq, pk, pv = layout.pad_queries(q), layout.pad_keys(k), layout.pad_keys(v)
    plain = layout.keys <= PLAIN_KEYS and q.device.type == "cpu"
    out = _plain(pq, pk, pv, layout) if plain and layout.mask is not None else _fused(pq, pk, pv, layout)
    return layout.unpad(out)


class _Compiled(torch.autograd.Function):
    """The plain product with compiled kernels between the matrix products: what is kept is q, k, v and the weights."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout
    ) -> Tensor:
        rope = None if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
        table, heads, kv_heads, width = layout.table, q.shape[1], k.shape[1], q.shape[2]
        ctx.shape = (layout.sequences * kv_heads, heads // kv_heads * layout.queries, layout.keys, width)
        pairs, rows, keys, _ = ctx.shape
        pq = cpu.pad(q.contiguous(), table, layout.queries, rope, keys=False).view(pairs, rows, width)
        pk = cpu.pad(k.contiguous(), table, keys, rope, keys=True).view(pairs, keys, width)
        pv = cpu.pad(v.contiguous(), table, keys, None, keys=True).view(pairs, keys, width)
        ctx.sizes = (layout.queries, layout.window or 0, width**-0.5)
        weights = torch.bmm(pq, pk.transpose(1, 2))
        cpu.causal_softmax_(weights.view(layout.sequences, -1, keys), table, *ctx.sizes)
        out = torch.bmm(weights, pv).view(layout.sequences, heads, layout.queries, width)
        ctx.save_for_backward(q, k, v, cos, sin, pq, pk, pv, weights)
        ctx.layout = layout
        return cpu.gather(out, table, len(q), None, keys=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dv = w^T dy, dw = dy v^T, ds = w (dw - sum w dw) / sqrt(d), dq = ds k, dk = ds^T q; then turned back."""
        q, k, v, cos, sin, pq, pk, pv, weights = ctx.saved_tensors
        layout = ctx.layout
        rope = None if cos is None else (cos, sin)
        if torch.is_grad_enabled():  # differentiated again
            with torch.enable_grad():
                out = _composed(q, k, v, layout, rope)
                return (*torch.autograd.grad(out, (q, k, v), grads[0], create_graph=True), None, None, None)
        table, tokens = layout.table, len(q)
        pairs, rows, keys, width = ctx.shape
        rope = None if rope is None else (cos.contiguous(), sin.contiguous())
        grad = cpu.pad(grads[0].contiguous(), table, layout.queries, None, keys=False).view(pairs, rows, width)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        inner = torch.bmm(grad, pv.transpose(1, 2))
        lines = (layout.sequences, -1, keys)
        cpu.causal_softmax_backward_(inner.view(lines), weights.view(lines), table, *ctx.sizes)
        grad_q, grad_k = torch.bmm(inner, pk), torch.bmm(inner.transpose(1, 2), pq)
        of_queries = (layout.sequences, q.shape[1], layout.queries, width)
        of_keys = (layout.sequences, k.shape[1], keys, width)
        return (
            cpu.gather(grad_q.view(of_queries), table, tokens, rope, keys=False),
            cpu.gather(grad_k.view(of_keys), table, tokens, rope, keys=True),
            cpu.gather(grad_v.view(of_keys), table, tokens, None, keys=True),
            None,
            None,
            None,
        )


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
