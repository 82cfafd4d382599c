"""Causal attention over a ragged batch. Padding exists in here and nowhere else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from upslope.kernels import cpu, gpu
from upslope.models.ops import rotate
from upslope.ragged import Ragged, send

PLAIN_KEYS = 256  # up to here the plain product has the faster backward pass on a CPU; beyond, memory decides
KEPT_KEYS = 512  # up to here the compiled way keeps the weights for the backward pass; beyond, it makes them again
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
QUERIES = 256  # of each sequence, whose weights stand in memory at once beyond KEPT_KEYS


class Block(NamedTuple):
    """Some queries of the sequences that have them, and the keys that these may see."""

    rows: Tensor | None  # the sequences; None: all of them
    queries: slice
    keys: slice
    table: Tensor  # for each of the rows, as `cpu.causal_softmax_` reads it

    def part(self, x: Tensor, places: slice) -> Tensor:
        """(B, heads, places, d) -> those rows and places."""
        return x[:, :, places] if self.rows is None else x[self.rows][:, :, places]

    def put(self, total: Tensor, part: Tensor) -> None:
        """Write what belongs to the queries of those rows, of grouped heads, into its place."""
        chosen = slice(None) if self.rows is None else self.rows
        total[chosen, :, self.queries] = part.view(len(part), total.shape[1], -1, total.shape[3])

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add what belongs to the keys of those rows."""
        total[slice(None) if self.rows is None else self.rows, :, self.keys] += part


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
        return send(self._rows * self.queries + self._column, self.device)

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
            return send(own, self.device), None
        parent_starts = torch.tensor([batch.starts[p] if p >= 0 else 0 for p in batch.parent])
        parent_rows = torch.arange(len(batch)).repeat_interleave(prefixes)
        offset = torch.arange(len(parent_rows)) - (prefixes.cumsum(0) - prefixes).repeat_interleave(prefixes)
        source = parent_starts.repeat_interleave(prefixes) + offset
        place = send(torch.cat((own, parent_rows * self.keys + offset)), self.device)
        return place, send(torch.cat((torch.arange(batch.tokens), source)), self.device)

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor]:
        """Offsets (B + 1, int32) of the sequences' queries, and of their keys laid end to end."""
        keys = [a + b for a, b in zip(self.batch.lengths, self.batch.prefix_lengths, strict=True)]
        offsets = torch.tensor([self.batch.starts, (0, *itertools.accumulate(keys))], dtype=torch.int32)
        q, k = send(offsets, self.device).unbind()
        return q, k

    @cached_property
    def key_source(self) -> Tensor | None:
        """The token that each key is, where a parent's stand in front of its children's; None: each once, in order."""
        batch = self.batch
        if not self.parents:
            return None
        prefixes = torch.tensor(batch.prefix_lengths)
        count = torch.tensor(batch.lengths) + prefixes
        rows = torch.arange(len(batch)).repeat_interleave(count)
        place = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
        parents = torch.tensor([batch.starts[p] if p >= 0 else 0 for p in batch.parent])
        own = torch.tensor(batch.starts[:-1]) - prefixes
        return send(place + torch.where(place < prefixes[rows], parents[rows], own[rows]), self.device)

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
    def blocks(self) -> list[Block]:
        """Parts of the queries and the keys that they may see, for the compiled kernels."""
        step = QUERIES if self.keys > KEPT_KEYS else self.queries
        return [self._block(first, min(first + step, self.queries)) for first in range(0, self.queries, step)]

    def _block(self, first: int, end: int) -> Block:
        batch = self.batch
        alive = [b for b, length in enumerate(batch.lengths) if length > first or first == 0]
        prefixes = [batch.prefix_lengths[b] for b in alive]
        last = [prefix + min(end, batch.lengths[b]) for b, prefix in zip(alive, prefixes, strict=True)]
        begin = 0 if self.window is None else max(0, min(prefixes) + first - self.window + 1)
        table = [
            (0, batch.lengths[b] - first, 0, prefix + first - begin) for b, prefix in zip(alive, prefixes, strict=True)
        ]
        rows = None if len(alive) == len(batch) else torch.tensor(alive)
        return Block(rows, slice(first, end), slice(begin, max(last)), torch.tensor(table))

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
        return send(allowed[:, None], self.device)

    def padded(
        self, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, queries, d), keys and values (B, kv heads, keys, d), the first two turned: compiled."""
        return (
            cpu.pad(q.contiguous(), self.table, self.queries, rope, keys=False),
            cpu.pad(k.contiguous(), self.table, self.keys, rope, keys=True),
            cpu.pad(v.contiguous(), self.table, self.keys, None, keys=True),
        )

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
    if cpu.serve(q, k, v):
        cos, sin = (None, None) if rope is None else rope
        compiled: Tensor = _Compiled.apply(q, k, v, cos, sin, layout)
        return compiled
    if _flash_serves(q):
        cos, sin = (None, None) if rope is None else rope
        unpadded: Tensor = _Unpadded.apply(q, k, v, cos, sin, layout)
        return unpadded
    if _plain_serves(q, layout):
        return _composed(q, k, v, layout, rope)
    cos, sin = (None, None) if rope is None else rope
    padded: Tensor = _Padded.apply(q, k, v, cos, sin, layout)
    return padded


def _composed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    pq, pk, pv = layout.pad_queries(q), layout.pad_keys(k), layout.pad_keys(v)
    return layout.unpad((_plain if _plain_serves(q, layout) else _fused)(pq, pk, pv, layout))


def _plain_serves(q: Tensor, layout: Layout) -> bool:
    return layout.keys <= PLAIN_KEYS and q.device.type == "cpu" and layout.mask is not None


class _Compiled(torch.autograd.Function):
    """The plain product, block of queries by block, with compiled kernels between the matrix products."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout
    ) -> Tensor:
        rope = None if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
        pq, pk, pv = layout.padded(q, k, v, rope)
        out, weights = torch.empty_like(pq), None
        for block in layout.blocks:
            weights = _weights(_group(block.part(pq, block.queries), pk), block.part(pk, block.keys), block, layout)
            block.put(out, torch.matmul(weights, block.part(pv, block.keys)))
        ctx.save_for_backward(q, k, v, cos, sin, weights if len(layout.blocks) == 1 else None)
        ctx.layout = layout
        return cpu.gather(out, layout.table, len(q), None, keys=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dv = w^T dy, dw = dy v^T, ds = w (dw - sum w dw) / sqrt(d), dq = ds k, dk = ds^T q; then turned back."""
        q, k, v, cos, sin, kept = ctx.saved_tensors
        layout: Layout = ctx.layout
        rope = None if cos is None else (cos, sin)
        if torch.is_grad_enabled():  # differentiated again
            return (*_gradients((q, k, v, cos, sin), layout, grads[0], again=True), None, None, None)
        table, tokens = layout.table, len(q)
        rope = None if rope is None else (cos.contiguous(), sin.contiguous())
        pq, pk, pv = layout.padded(q, k, v, rope)
        grad = cpu.pad(grads[0].contiguous(), table, layout.queries, None, keys=False)
        alone = len(layout.blocks) == 1
        grad_q = torch.empty_like(pq)
        wide = () if alone else tuple(torch.zeros_like(x, dtype=torch.float32) for x in (pk, pv))
        for block in layout.blocks:
            some_q, some_grad = (_group(block.part(x, block.queries), pk) for x in (pq, grad))
            some_k, some_v = (block.part(x, block.keys) for x in (pk, pv))
            weights = _weights(some_q, some_k, block, layout) if kept is None else kept
            inner = some_grad @ some_v.transpose(2, 3)
            cpu.causal_softmax_backward_(_lines(inner), _lines(weights), block.table, *_sizes(block, layout, pq))
            block.put(grad_q, inner @ some_k)
            by_keys = (inner.transpose(2, 3) @ some_q, weights.transpose(2, 3) @ some_grad)
            if alone:
                wide = by_keys
                break
            for total, part in zip(wide, by_keys, strict=True):
                block.add(total, part)
        grad_k, grad_v = (x.to(k.dtype) for x in wide)
        by_k = cpu.gather(grad_k, table, tokens, rope, keys=True)
        by_v = cpu.gather(grad_v, table, tokens, None, keys=True)
        return cpu.gather(grad_q, table, tokens, rope, keys=False), by_k, by_v, None, None, None


class _Padded(torch.autograd.Function):
    """torch's fused attention, made again for its gradient; by plain operations where that is differentiated too."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, cos, sin)
        ctx.layout = layout
        return _composed(q, k, v, layout, None if cos is None or sin is None else (cos, sin))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx.saved_tensors, ctx.layout, grads[0], again=torch.is_grad_enabled()), None, None, None)


def _gradients(saved: Sequence[Tensor], layout: Layout, grad: Tensor, *, again: bool) -> tuple[Tensor, ...]:
    """Of the composed way by queries, keys and values; again: themselves to be differentiated."""
    q, k, v, cos, sin = saved
    with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH] if again else FUSED):
        leaves = (q, k, v) if again else [x.detach().requires_grad_() for x in (q, k, v)]
        out = _composed(leaves[0], leaves[1], leaves[2], layout, None if cos is None else (cos, sin))
        return torch.autograd.grad(out, leaves, grad, create_graph=again)


class _Unpadded(torch.autograd.Function):
    """FlashAttention over sequences end to end, on a GPU: a parent's keys are repeated in front of its children's.

    Dao 2023, "FlashAttention-2" (arXiv 2307.08691); causality is counted from the last query and the last key.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout
    ) -> Tensor:
        inputs = _unpadded(q, k, v, cos, sin, layout)
        sizes = (*layout.cumulative, layout.queries, layout.keys, 0.0, True)
        out, norm, *state, _ = torch.ops.aten._flash_attention_forward(*inputs, *sizes, False, **_window(layout))
        ctx.save_for_backward(q, k, v, cos, sin, out, norm, *state)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, out, norm, *state = ctx.saved_tensors
        layout: Layout = ctx.layout
        if torch.is_grad_enabled():  # differentiated again
            return (*_gradients((q, k, v, cos, sin), layout, grads[0], again=True), None, None, None)
        inputs = _unpadded(q, k, v, cos, sin, layout)
        sizes = (*layout.cumulative, layout.queries, layout.keys, 0.0, True)
        by_q, by_k, by_v = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(), *inputs, out, norm, *sizes, *state, **_window(layout)
        )
        if layout.key_source is not None:  # a parent's tokens: the sum over all places that they stand in
            by_k, by_v = (
                torch.zeros_like(x, dtype=torch.float32).index_add_(0, layout.key_source, by.float()).to(x.dtype)
                for x, by in ((k, by_k), (v, by_v))
            )
        if cos is not None:
            by_q, by_k = gpu.rotate(by_q, cos, sin, back=True), gpu.rotate(by_k, cos, sin, back=True)
        return by_q, by_k, by_v, None, None, None


def _flash_serves(q: Tensor) -> bool:
    width = q.shape[-1]
    fits = q.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256
    return fits and gpu.serve(q) and torch.backends.cuda.is_flash_attention_available()


def _unpadded(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values end to end, the first two turned."""
    if cos is not None and sin is not None:
        q, k = gpu.rotate(q, cos, sin), gpu.rotate(k, cos, sin)
    source = layout.key_source
    return (q, k, v) if source is None else (q, k[source], v[source])


def _window(layout: Layout) -> dict[str, int]:
    return {} if layout.window is None else {"window_size_left": layout.window - 1, "window_size_right": 0}


def _group(q: Tensor, k: Tensor) -> Tensor:
    """(B, heads, queries, d) -> (B, kv heads, heads / kv heads x queries, d)."""
    return q.reshape(len(q), k.shape[1], -1, q.shape[3])


def _weights(q: Tensor, k: Tensor, block: Block, layout: Layout) -> Tensor:
    """Of grouped queries (B, kv heads, rows, d) over keys (B, kv heads, keys, d): (B, kv heads, rows, keys)."""
    scores = torch.matmul(q, k.transpose(2, 3))
    cpu.causal_softmax_(_lines(scores), block.table, *_sizes(block, layout, q))
    return scores


def _lines(scores: Tensor) -> Tensor:
    """(B, kv heads, rows, keys) -> (B, kv heads x rows, keys)."""
    return scores.view(len(scores), -1, scores.shape[-1])


def _sizes(block: Block, layout: Layout, q: Tensor) -> tuple[int, int, float]:
    """What the softmax is told: queries, window, scale."""
    return block.queries.stop - block.queries.start, layout.window or 0, q.shape[-1] ** -0.5


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
