"""A stack of transformer blocks of the older shapes: T5, BART, BERT.

    x = x + f(norm(x))  for each part f, and a norm behind the last block        (pre_norm: T5)
    x = norm(x + f(x))                                                           (BART, BERT)

The parts of a block are attention to its own sequence, attention across to another one where it has that (a decoder's,
to the encoder's states), and a feed-forward layer. No dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upslope.errors import ModelError
from upslope.models.cross import distance_buckets
from upslope.models.decoder import ACTIVATIONS as COMMON
from upslope.models.decoder import Linear, Norm

ACTIVATIONS = {**COMMON, "relu": F.relu}

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (N, heads, d) -> (N, heads, d)
Across = Callable[[Tensor], Tensor]  # q -> (N, heads, d); the keys and values are the other sequence's


@dataclass(frozen=True)
class StackConfig:
    """The shape of a stack; the defaults are T5 1.1's."""

    width: int
    layers: int
    heads: int
    head_dim: int
    ffn_width: int
    context: int
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    pre_norm: bool = True
    embed_norm: bool = False
    bias: bool = False
    scaled: bool = False  # attention scores divided by sqrt(head_dim)
    gated: bool = True
    activation: str = "gelu_tanh"
    position: str = "relative"  # or "learned"
    position_offset: int = 0  # rows of the learned table in front of position 0
    buckets: int = 32
    max_distance: int = 128
    across: bool = False

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5) if self.scaled else 1.0


class Attention(nn.Module):
    """The four projections of an attention; who looks at whom is the caller's."""

    def __init__(self, c: StackConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = c.heads, c.head_dim
        inner = c.heads * c.head_dim
        self.q = Linear(c.width, inner, bias=c.bias)
        self.k = Linear(c.width, inner, bias=c.bias)
        self.v = Linear(c.width, inner, bias=c.bias)
        self.o = Linear(inner, c.width, bias=c.bias)

    def queries(self, h: Tensor) -> Tensor:
        return self.q(h).view(-1, self.heads, self.head_dim)

    def keys_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.k(h).view(-1, self.heads, self.head_dim), self.v(h).view(-1, self.heads, self.head_dim)


class Block(nn.Module):
    """Attention to the own sequence, attention across where there is one, feed-forward; each with a residual."""

    def __init__(self, c: StackConfig) -> None:
        super().__init__()
        self.config = c
        self.own_norm = Norm(c.width, c.norm, c.norm_eps)
        self.own = Attention(c)
        self.across_norm = Norm(c.width, c.norm, c.norm_eps) if c.across else None
        self.across = Attention(c) if c.across else None
        self.mlp_norm = Norm(c.width, c.norm, c.norm_eps)
        self.gate = Linear(c.width, c.ffn_width, bias=c.bias) if c.gated else None
        self.up = Linear(c.width, c.ffn_width, bias=c.bias)
        self.down = Linear(c.ffn_width, c.width, bias=c.bias)

    def forward(self, x: Tensor, mix: Mix, across: Across | None = None) -> Tensor:
        """x_ND through the block; `mix` and `across` do the two attentions between their projections."""

        def own(h: Tensor) -> Tensor:
            return self.own.o(mix(self.own.queries(h), *self.own.keys_values(h)).reshape(len(h), -1))

        x = self._residual(x, self.own_norm, own)
        if self.across is not None and self.across_norm is not None and across is not None:
            other = self.across

            def looking(h: Tensor) -> Tensor:
                return other.o(across(other.queries(h)).reshape(len(h), -1))

            x = self._residual(x, self.across_norm, looking)
        return self._residual(x, self.mlp_norm, self.feed_forward)

    def feed_forward(self, h: Tensor) -> Tensor:
        active = ACTIVATIONS[self.config.activation]
        return self.down(active(self.up(h)) if self.gate is None else active(self.gate(h)) * self.up(h))

    def _residual(self, x: Tensor, norm: Norm, part: Callable[[Tensor], Tensor]) -> Tensor:
        return x + part(norm(x)) if self.config.pre_norm else norm(x + part(x))


class Stack(nn.Module):
    """Blocks with the positions and norms around them."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        check_stack(config)
        c = self.config = config
        learned, relative = c.position == "learned", c.position == "relative"
        self.position = nn.Embedding(c.context + c.position_offset, c.width) if learned else None
        self.relative = nn.Embedding(c.buckets, c.heads) if relative else None
        self.embed_norm = Norm(c.width, c.norm, c.norm_eps) if c.embed_norm else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = Norm(c.width, c.norm, c.norm_eps) if c.pre_norm else None

    def enter(self, x: Tensor, positions_N: Tensor) -> Tensor:
        """What goes into the first block: embedded tokens with their positions."""
        if self.position is not None:
            x = x + self.position(positions_N + self.config.position_offset)
        return x if self.embed_norm is None else self.embed_norm(x)

    def leave(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def bias(self, query_RQ: Tensor, keys: int) -> Tensor | None:
        """The relative bias (R, heads, Q, keys) of queries at these positions to keys at 0 to keys - 1; None: has none.

        A stack that looks across is a decoder: keys behind a query are masked and have no buckets of their own.
        """
        if self.relative is None:
            return None
        c = self.config
        distance = torch.arange(keys, device=query_RQ.device) - query_RQ[:, :, None]
        buckets = distance_buckets(distance, c.buckets, c.max_distance, both_sides=not c.across)
        found: Tensor = self.relative(buckets).permute(0, 3, 1, 2)
        return found


def check_stack(c: StackConfig) -> None:
    """Raise ModelError for a shape that cannot be."""
    for name, value, known in (
        ("norm", c.norm, ("rms", "layer")),
        ("position", c.position, ("relative", "learned")),
        ("activation", c.activation, tuple(ACTIVATIONS)),
    ):
        if value not in known:
            raise ModelError(f"{name} {value!r} is not known", f"use one of {', '.join(known)}")
    if c.position == "relative" and not 4 <= c.buckets < 2 * c.max_distance:
        raise ModelError(
            f"{c.buckets} buckets of relative positions up to {c.max_distance} cannot be", "mend the configuration"
        )
