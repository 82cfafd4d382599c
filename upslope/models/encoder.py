"""An encoder of BERT's shape over ragged batches: a policy of one action, the choice of a label.

    states = blocks(norm(embed(ids) + position + type))       both ways within each sequence
    pooled = tanh(W states[0] + b), or mean over states       logits over the labels = labels (pooled, 1)

The mean is what sentence encoders are trained with (Reimers and Gurevych 2019, "Sentence-BERT", arXiv 1908.10084):
their folders say so, and the pooler that some of them still hold is not read.

Where it chooses among passages, the source is a text and its passages, each ended by the separator:

    logit_k = exp(s) cos(pooled(text), pooled(passage k))      each read by itself, s learned

A prompt is a sequence without a parent; the state that chooses its label is given at its last token, and the label is
its child's one token. The hidden states of other places are 0 and nothing reads them.
Devlin et al. 2019, "BERT" (arXiv 1810.04805).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from upslope.errors import ModelError
from upslope.models.cross import Whole, attend_biased
from upslope.models.decoder import Linear, Norm
from upslope.models.passages import SHARP, compared, split_sources, weight_of
from upslope.models.stack import ACTIVATIONS, Stack, StackConfig
from upslope.models.trunk import Trunk, draw_normal
from upslope.ragged import Ragged


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder.

    tokens: of its vocabulary; mean: pooled is the mean of the states; paired: it tells whether a text follows another;
    labels: the names of what it chooses from, none at first; separator: where these are the numbers of passages, what
    ends each of them.
    """

    tokens: int
    stack: StackConfig
    types: int = 2
    pooler: bool = True
    mean: bool = False
    masked_head: bool = True
    paired: bool = False
    labels: tuple[str, ...] = ()
    pad_id: int = 0
    separator: int | None = None

    @property
    def vocab_size(self) -> int:
        """How many actions there are."""
        return len(self.labels) or self.tokens

    @property
    def width(self) -> int:
        """Of the pooled state, and a column of ones for the bias of the labels; or of what chooses a passage."""
        return self.stack.width + (1 if self.separator is None else 2 * len(self.labels))

    @property
    def context(self) -> int:
        """How long a source may be: where passages are read by themselves, this many times the longest of them."""
        return self.stack.context * (1 if self.separator is None else len(self.labels) + 1)


class MaskedHead(nn.Module):
    """What stands between a state and the vocabulary: norm(act(W h + b)), and a bias of the logits."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.activation = c.stack.activation
        self.dense = Linear(c.stack.width, c.stack.width)
        self.norm = Norm(c.stack.width, c.stack.norm, c.stack.norm_eps)
        self.bias = nn.Parameter(torch.zeros(c.tokens))

    def forward(self, states_ND: Tensor) -> Tensor:
        normed: Tensor = self.norm(ACTIVATIONS[self.activation](self.dense(states_ND)))
        return normed


class Encoder(Trunk):
    """A bidirectional encoder that chooses labels."""

    needs_source = True
    masks = True
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.stack.width
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = nn.Embedding(config.tokens, width)
        self.types = nn.Embedding(config.types, width)
        self.stack = Stack(config.stack)
        self.pooler = Linear(width, width) if config.pooler else None
        self.masked = MaskedHead(config) if config.masked_head else None
        self.pair = nn.Linear(width, 2) if config.paired else None
        chooses = bool(config.labels) and config.separator is None
        self.label_head = nn.Linear(width, len(config.labels)) if chooses else None
        self.sharpness = None if config.separator is None else nn.Parameter(torch.tensor([SHARP]))

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.stack.blocks

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.labels

    @property
    def separator(self) -> int | None:
        return self.config.separator

    @property
    def output_weight(self) -> Tensor:
        """weight_LD of the labels, their bias the last column; of passages see passages.py. Raises ModelError where
        there are none."""
        if self.sharpness is not None:
            return weight_of(len(self.labels), self.config.stack.width).to(self.sharpness)
        if self.label_head is None:
            raise ModelError("an encoder without labels chooses nothing and writes no text", "set data.classes")
        return torch.cat((self.label_head.weight, self.label_head.bias[:, None]), dim=1)

    @property
    def output_dtype(self) -> torch.dtype:
        """Logits of passages are made before the projection, which only passes them on: in fp32, as they are."""
        return self.compute_dtype if self.sharpness is None else torch.float32

    def take_labels(self, labels: tuple[str, ...], separator: int | None = None) -> None:
        """Choose among these from now on: a new head finds all alike, passages are first compared as they are read.

        Raises ModelError where there are other labels.
        """
        for idle in (self.masked, self.pair):
            if idle is not None:
                idle.requires_grad_(False)  # nothing reads it
        if separator is not None and (not self.config.labels or self.config.separator == separator):
            self.config = replace(self.config, labels=labels, separator=separator)  # no weight is one passage's own
            if self.sharpness is None:
                self.sharpness = nn.Parameter(torch.tensor([SHARP]).to(self.embed.weight))
            return
        if self.config.labels == labels and self.config.separator == separator:
            return
        if self.config.labels:
            shown = ", ".join(sorted(set(self.config.labels) ^ set(labels))[:5])
            raise ModelError(
                f"the model chooses among {len(self.config.labels)} labels, the training side has {len(labels)}; "
                f"not in both: {shown}",
                "use the data it was trained with, or start from the encoder itself",
            )
        self.config = replace(self.config, labels=labels)
        self.label_head = nn.Linear(self.config.stack.width, len(labels)).to(self.embed.weight)
        with torch.no_grad():
            self.label_head.weight.zero_()
            self.label_head.bias.zero_()

    def hidden(self, batch: Ragged) -> Tensor:
        """hidden_ND in compute_dtype: the pooled state and a 1 at each source's last token.

        Raises ModelError beyond the context.
        """
        rows = [b for b, p in enumerate(batch.parent) if p < 0]
        lengths = torch.tensor(batch.lengths)
        is_source_N = (torch.tensor(batch.parent) < 0).repeat_interleave(lengths)
        starts = [0]
        for b in rows:
            starts.append(starts[-1] + batch.lengths[b])
        ids_N = batch.ids_N[is_source_N.to(batch.ids_N.device)]
        pooled = self.pooled(Ragged(ids_N, tuple(starts), (-1,) * len(rows)))
        ends = torch.tensor([batch.starts[b + 1] - 1 for b in rows], device=pooled.device)
        return pooled.new_zeros(batch.tokens, pooled.shape[1]).index_copy(0, ends, pooled)

    def pooled(self, sources: Ragged) -> Tensor:
        """(B, D + 1): the pooled state of each sequence, and a 1; or, of sources with passages, what chooses one."""
        if self.sharpness is not None:
            return self._compared(sources)
        return self._pooled(sources)

    def _compared(self, sources: Ragged) -> Tensor:
        """(B, 2 K + D) in fp32: what passages.compared makes of each source's text and passages."""
        assert self.sharpness is not None and self.config.separator is not None
        parts, counts = split_sources(sources, self.config.separator, len(self.labels))
        pooled_MD = self._pooled(parts.to(self.device))[:, :-1].float()
        return compared(pooled_MD, counts, len(self.labels), self.sharpness.float())

    def _pooled(self, sources: Ragged) -> Tensor:
        return self.pool(self.states(sources), sources)

    def pool(self, states: Tensor, sources: Ragged) -> Tensor:
        """(B, D + 1): the pooled state of each sequence from the states of its tokens, and a 1."""
        if self.config.mean:
            row_N = torch.arange(len(sources)).repeat_interleave(torch.tensor(sources.lengths)).to(states.device)
            sums = states.new_zeros(len(sources), states.shape[1], dtype=torch.float32)
            sums = sums.index_add(0, row_N, states.float())
            state = (sums / torch.tensor(sources.lengths, device=states.device)[:, None]).to(states.dtype)
            return torch.cat((state, state.new_ones(len(state), 1)), dim=1)
        first = states[torch.tensor(sources.starts[:-1], device=self.device)]
        state = first if self.pooler is None else torch.tanh(self.pooler(first))
        return torch.cat((state, state.new_ones(len(state), 1)), dim=1)

    def states(self, batch: Ragged, types_N: Tensor | None = None) -> Tensor:
        """states_ND of whole sequences in compute_dtype; types_N: 0 for a first text, 1 for a second one."""
        for b, length in enumerate(batch.lengths):
            if not length:
                raise ModelError(f"source {b} of the batch is empty", "an encoder needs a token to look at: remove it")
            if length > self.config.stack.context:
                limit = self.config.stack.context
                raise ModelError(f"a source of {length} tokens exceeds the model's context of {limit}", "shorten it")
        row_N = torch.arange(len(batch)).repeat_interleave(torch.tensor(batch.lengths))
        whole = Whole(row_N, row_N, len(batch), self.device)
        types_N = torch.zeros_like(row_N) if types_N is None else types_N
        x = self.embed(batch.ids_N.to(self.device)) + self.types(types_N.to(self.device))
        x = self.stack.enter(x, batch.positions.to(self.device)).to(self.compute_dtype)
        mix = partial(attend_biased, places=whole, scale=self.config.stack.scale)
        for block in self.stack.blocks:
            x = block(x, mix)
        return self.stack.leave(x)

    def read_masks(self, paired: bool = False) -> None:
        """Learn masked tokens from now on and, where paired, whether a second text follows the first.

        For pairs a new head finds both alike; without them nothing reads the pooler. Raises ModelError for an encoder
        without the head of masked tokens, and for pairs where it cannot tell two texts apart.
        """
        if self.masked is None:
            raise ModelError("this encoder has no head for masked tokens", "start from one that has, or from scratch")
        if paired and self.config.types < 2:
            raise ModelError("this encoder has one type of text, pairs need two", "use another, or data.next = false")
        self.masked.requires_grad_(True)
        if self.pooler is not None:
            self.pooler.requires_grad_(paired)
        if paired and self.pair is None:
            self.config = replace(self.config, paired=True)
            self.pair = nn.Linear(self.config.stack.width, 2).to(self.embed.weight)
            with torch.no_grad():
                self.pair.weight.zero_()
                self.pair.bias.zero_()
        if self.pair is not None:
            self.pair.requires_grad_(paired)

    def masked_states(self, states_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden_N(D + 1), weight_V(D + 1)) of what stands at these places, the bias as the last column."""
        if self.masked is None:
            raise ModelError("this encoder has no head for masked tokens", "start from one that has, or from scratch")
        hidden = self.masked(states_ND)
        weight = torch.cat((self.embed.weight, self.masked.bias[:, None]), dim=1)
        return torch.cat((hidden, hidden.new_ones(len(hidden), 1)), dim=1), weight

    def follows(self, states_ND: Tensor, pairs: Ragged) -> Tensor:
        """logit_B2 of pairs of texts from their states: that the second follows the first, that it does not (BERT's
        order). Raises ModelError without the head."""
        if self.pair is None:
            raise ModelError("this encoder has no head for pairs of texts", "set data.next for its stage pretrain")
        pooled_BD = self.pool(states_ND, pairs)[:, :-1]
        logit_B2: Tensor = pooled_BD.float() @ self.pair.weight.float().t() + self.pair.bias.float()
        return logit_B2

    def lowest(self, layers: int) -> list[nn.Parameter]:
        """The parameters of the embeddings and of the lowest blocks."""
        around = [m for m in (self.stack.position, self.stack.embed_norm) if m is not None]
        return [p for part in (self.embed, self.types, *around, *self.blocks[:layers]) for p in part.parameters()]

    def init_weights(self, seed: int) -> Encoder:
        """Normal weights of deviation 0.02 at BERT's width of 768, growing as 1 / sqrt(width); from a seed alone.

        Behind a norm a block adds what its weights keep of a unit vector: a narrow one of 0.02 next to nothing.
        """
        draw_normal(self, seed, 0.02 * math.sqrt(768 / self.config.stack.width))
        return self
