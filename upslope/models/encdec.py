"""An encoder-decoder over ragged batches, for the T5 and BART shapes.

    memory = encoder(source)                  both ways within the source
    y_t    = decoder(start, y_1 .. y_t)       causal, and across to the whole of memory

In a batch a sequence without a parent is a source, and its children are what is written to it. A decoder begins with
start tokens that stand in no batch: the state behind them, which predicts a child's first token, is given at the last
token of the source, so that `batch.previous` means here what it means for a decoder. The start tokens of a source are
computed once for all of its children. The hidden states of other source tokens are 0 and nothing reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from upslope.errors import ModelError
from upslope.models.attention import Layout
from upslope.models.cross import Whole, attend_biased
from upslope.models.decoder import Linear
from upslope.models.stack import Stack, StackConfig
from upslope.models.trunk import Trunk, draw_normal
from upslope.ragged import Ragged


@dataclass(frozen=True)
class EncDecConfig:
    """The shape of an encoder-decoder. start_ids: what a decoder's row begins with, a forced first token included."""

    vocab_size: int
    encoder: StackConfig
    decoder: StackConfig
    start_ids: tuple[int, ...] = (0,)
    tied: bool = True
    scale_logits: bool = True  # logits divided by sqrt(width)
    scale_embedding: bool = False  # embeddings times sqrt(width)
    pad_id: int = 0  # these three are only handed on to an export
    eos_id: int = 1
    bos_id: int | None = None

    @property
    def width(self) -> int:
        return self.decoder.width

    @property
    def context(self) -> int:
        """Tokens that a source, and what is written to it, may have; learned positions are taken up by start tokens."""
        taken = len(self.start_ids) if self.decoder.position == "learned" else 0
        return min(self.encoder.context, self.decoder.context - taken)


class Seats:
    """A batch taken apart: the sources, and the decoder's rows, which are start rows (one a source) and then children.

    Token taken[i] of the decoder's rows gives the hidden state at place[i] of the batch; source_of_* is the number of
    the source that each token of the decoder's rows looks at, and that each token of the memory belongs to.
    """

    def __init__(self, batch: Ragged, start_ids: tuple[int, ...]) -> None:
        sources = [b for b, p in enumerate(batch.parent) if p < 0]
        children = [b for b, p in enumerate(batch.parent) if p >= 0]
        number = {b: s for s, b in enumerate(sources)}
        count, start = len(sources), len(start_ids)
        parents = [number[batch.parent[b]] for b in children]
        ids_N = batch.ids_N
        is_source_N = torch.tensor([p < 0 for p in batch.parent]).repeat_interleave(torch.tensor(batch.lengths))
        mine = is_source_N.to(ids_N.device)
        self.sources = _ragged(ids_N[mine], [batch.lengths[b] for b in sources])
        begun = torch.tensor(start_ids * count, dtype=torch.int64, device=ids_N.device)
        lengths = [start] * count + [batch.lengths[b] for b in children]
        self.targets = _ragged(torch.cat((begun, ids_N[~mine])), lengths, [-1] * count + parents)
        self.source_of_memory = torch.arange(count).repeat_interleave(torch.tensor(self.sources.lengths))
        self.source_of_target = torch.tensor([*range(count), *parents]).repeat_interleave(torch.tensor(lengths))
        self.taken = torch.cat((torch.arange(1, count + 1) * start - 1, torch.arange(count * start, sum(lengths))))
        ends = torch.tensor([batch.starts[b + 1] - 1 for b in sources])
        self.place = torch.cat((ends, torch.nonzero(~is_source_N).squeeze(1)))


class EncDec(Trunk):
    """An encoder-decoder language model over ragged batches of sources and what is written to them."""

    needs_source = True
    config: EncDecConfig

    def __init__(self, config: EncDecConfig) -> None:
        super().__init__()
        check_encdec(config)
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Stack(config.encoder)
        self.decoder = Stack(config.decoder)
        self.head = None if config.tied else Linear(config.width, config.vocab_size, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """All blocks, the lowest first: the encoder's, then the decoder's."""
        return nn.ModuleList([*self.encoder.blocks, *self.decoder.blocks])

    @property
    def output_weight(self) -> Tensor:
        """weight_VD of the projection to logits, the scale of these in it."""
        weight: Tensor = self.embed.weight if self.head is None else self.head.weight
        return weight * self.config.width**-0.5 if self.config.scale_logits else weight

    def lowest(self, layers: int) -> list[nn.Parameter]:
        """The parameters of the embeddings and of the lowest blocks, the encoder's before the decoder's."""
        around = [m for s in (self.encoder, self.decoder) for m in (s.position, s.embed_norm) if m is not None]
        return [p for part in (self.embed, *around, *self.blocks[:layers]) for p in part.parameters()]

    def hidden(self, batch: Ragged) -> Tensor:
        """hidden_ND behind the final norm, in compute_dtype. Raises ModelError beyond the context."""
        self._check_lengths(batch)
        seats = Seats(batch, self.config.start_ids)
        x = self.decode(seats, self.encode(seats))
        everywhere = x.new_zeros(batch.tokens, x.shape[1])
        return everywhere.index_copy(0, seats.place.to(x.device), x[seats.taken.to(x.device)])

    def encode(self, seats: Seats) -> Tensor:
        """memory_MD: the encoder's state at each source token."""
        sources = seats.sources
        x = self.embed_tokens(self.encoder, sources)
        whole = Whole(seats.source_of_memory, seats.source_of_memory, len(sources), self.device)
        bias = self.encoder.bias(torch.arange(whole.queries, device=self.device)[None], whole.keys)
        mix = partial(attend_biased, places=whole, scale=self.config.encoder.scale, bias=bias)
        for block in self.encoder.blocks:
            x = block(x, mix)
        return self.encoder.leave(x)

    def decode(self, seats: Seats, memory: Tensor) -> Tensor:
        """The decoder's state at each token of seats.targets."""
        targets, scale = seats.targets, self.config.decoder.scale
        x = self.embed_tokens(self.decoder, targets)
        layout = Layout(targets, self.device, None)
        whole = Whole(seats.source_of_target, seats.source_of_memory, len(seats.sources), self.device)
        mix = partial(attend_biased, places=layout, scale=scale, bias=self._causal_bias(targets, layout))
        for block in self.decoder.blocks:
            keys, values = block.across.keys_values(memory)  # type: ignore[union-attr, operator]
            x = block(x, mix, partial(attend_biased, k=keys, v=values, places=whole, scale=scale))
        return self.decoder.leave(x)

    def embed_tokens(self, stack: Stack, batch: Ragged) -> Tensor:
        return self.embed_at(stack, batch.ids_N.to(self.device), batch.positions.to(self.device))

    def embed_at(self, stack: Stack, ids_N: Tensor, positions_N: Tensor) -> Tensor:
        """What enters a stack's first block, in compute_dtype."""
        x = self.embed(ids_N)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.width)
        return stack.enter(x, positions_N).to(self.compute_dtype)

    def _causal_bias(self, targets: Ragged, layout: Layout) -> Tensor | None:
        """The relative bias of the decoder's rows: made once for start rows, once for rows behind them."""
        prefix_U, kind_B = torch.unique(torch.tensor(targets.prefix_lengths), return_inverse=True)
        positions_UQ = (torch.arange(layout.queries) + prefix_U[:, None]).to(self.device)
        bias = self.decoder.bias(positions_UQ, layout.keys)
        return None if bias is None else bias[kind_B.to(self.device)]

    def init_weights(self, seed: int) -> EncDec:
        """Normal weights of deviation 0.02 (0.02 / sqrt(2 layers) into the residual), from a seed alone."""
        draw_normal(
            self, seed, 0.02, residual=0.02 / math.sqrt(2 * max(self.config.encoder.layers, self.config.decoder.layers))
        )
        return self

    def _check_lengths(self, batch: Ragged) -> None:
        context = self.config.context
        for b, (length, parent) in enumerate(zip(batch.lengths, batch.parent, strict=True)):
            what = "source" if parent < 0 else "completion"
            if what == "source" and not length:
                raise ModelError(f"source {b} of the batch is empty", "an encoder needs a token to look at: remove it")
            if length > context:
                raise ModelError(f"a {what} of {length} tokens exceeds the model's context of {context}", "shorten it")


def check_encdec(c: EncDecConfig) -> None:
    """Raise ModelError for a shape that cannot be."""
    if c.encoder.width != c.decoder.width:
        raise ModelError(
            f"an encoder of width {c.encoder.width} and a decoder of width {c.decoder.width} do not join",
            "mend the configuration",
        )
    if c.encoder.across or not c.decoder.across:
        raise ModelError("the decoder looks across, the encoder does not", "mend the configuration")
    if not c.start_ids or not all(0 <= token < c.vocab_size for token in c.start_ids):
        raise ModelError(
            f"start tokens {list(c.start_ids)} are not of a vocabulary of {c.vocab_size}", "mend decoder_start_token_id"
        )


def _ragged(ids_N: Tensor, lengths: Sequence[int], parents: Sequence[int] | None = None) -> Ragged:
    return Ragged(ids_N, (0, *accumulate(lengths)), tuple(parents) if parents is not None else (-1,) * len(lengths))
