"""One decoder for the Llama, Mistral, Qwen2, Qwen3, SmolLM and GPT-2 shapes.

    x = embed(ids) (+ position)
    x = x + o(attend(rope(q(norm(x))), rope(k(norm(x))), v(norm(x))))
    x = x + down(silu(gate(norm(x))) * up(norm(x)))           or  down(gelu(up(norm(x))))
    logits = norm(x) head^T                                   never held whole: see algo.token_logprobs

Parameters stay in their own dtype (fp32 while they are trained); products are in `compute_dtype`. No dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upslope.errors import ModelError
from upslope.models.attention import Layout, attend
from upslope.models.ops import RMSNorm, SwiGLU
from upslope.models.trunk import Trunk, draw_normal
from upslope.ragged import Ragged, send

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; the defaults are Llama's."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    context: int
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    position: str = "rope"  # or "learned"
    rope_base: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mlp: str = "gated"  # or "plain"
    activation: str = "silu"
    tied: bool = True
    sliding_window: int | None = None


class Norm(nn.Module):
    """RMS or layer normalisation, computed in fp32."""

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            normed: Tensor = RMSNorm.apply(x, self.weight, self.eps)
            return normed
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.bias.to(wide), self.eps).to(x.dtype)


class Linear(nn.Linear):
    """A product in the dtype of its input, whatever the dtype its parameters are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = self.config = config
        inner = c.heads * c.head_dim
        self.attn_norm = Norm(c.width, c.norm, c.norm_eps)
        self.q = Linear(c.width, inner, bias=c.qkv_bias)
        self.k = Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o = Linear(inner, c.width, bias=c.out_bias)
        self.q_norm = Norm(c.head_dim, "rms", c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, "rms", c.norm_eps) if c.qk_norm else None
        self.mlp_norm = Norm(c.width, c.norm, c.norm_eps)
        self.gate = Linear(c.width, c.ffn_width, bias=c.mlp_bias) if c.mlp == "gated" else None
        self.up = Linear(c.width, c.ffn_width, bias=c.mlp_bias)
        self.down = Linear(c.ffn_width, c.width, bias=c.mlp_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, layout: Layout) -> Tensor:
        c = self.config
        h = self.attn_norm(x)
        q = self.q(h).view(-1, c.heads, c.head_dim)
        k = self.k(h).view(-1, c.kv_heads, c.head_dim)
        v = self.v(h).view(-1, c.kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        x = x + self.o(attend(q, k, v, layout, rope).reshape(len(x), -1))
        return x + self.feed_forward(self.mlp_norm(x))

    def feed_forward(self, h: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(ACTIVATIONS[self.config.activation](self.up(h)))
        if self.config.activation == "silu":
            mixed: Tensor = SwiGLU.apply(self.gate(h), self.up(h), self.down.weight.to(h.dtype))
            return mixed if self.down.bias is None else mixed + self.down.bias.to(h.dtype)
        return self.down(ACTIVATIONS[self.config.activation](self.gate(h)) * self.up(h))


class Decoder(Trunk):
    """A causal language model over ragged batches."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.width, config.norm, config.norm_eps)
        self.head = None if config.tied else Linear(config.width, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """weight_VD of the projection to logits."""
        return self.embed.weight if self.head is None else self.head.weight

    def hidden(self, batch: Ragged) -> Tensor:
        """hidden_ND behind the final norm, in compute_dtype. Raises ModelError beyond the context."""
        longest = max((a + b for a, b in zip(batch.lengths, batch.prefix_lengths, strict=True)), default=0)
        if longest > self.config.context:
            raise ModelError(
                f"a sequence of {longest} tokens exceeds the model's context of {self.config.context}", "shorten it"
            )
        positions = send(batch.positions, self.device)
        x = self.embed_tokens(batch.ids_N, positions)
        rope = self.rope(positions)
        layout = Layout(batch, self.device, self.config.sliding_window)
        for block in self.blocks:
            x = block(x, rope, layout)
        return self.norm(x)

    def embed_tokens(self, ids_N: Tensor, positions_N: Tensor) -> Tensor:
        x = self.embed(ids_N)
        if self.position is not None:
            x = x + self.position(positions_N)
        return x.to(self.compute_dtype)

    def rope(self, positions_N: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin (N, 1, head_dim / 2) of each token's position, in compute_dtype."""
        if self.config.position != "rope":
            return None
        angle = positions_N[:, None].double() * send(rope_frequencies(self.config), self.device)
        return angle.cos().to(self.compute_dtype)[:, None], angle.sin().to(self.compute_dtype)[:, None]

    def init_weights(self, seed: int) -> Decoder:
        """Normal weights of deviation 0.02 (0.02 / sqrt(2 layers) into the residual), from a seed alone."""
        draw_normal(self, seed, 0.02, residual=0.02 / math.sqrt(2 * self.config.layers))
        return self


def check_config(c: DecoderConfig) -> None:
    """Raise ModelError for a shape that cannot be."""
    if c.heads % c.kv_heads:
        raise ModelError(f"{c.heads} heads do not divide among {c.kv_heads} key-value heads", "mend the configuration")
    for name, value, known in (
        ("norm", c.norm, ("rms", "layer")),
        ("position", c.position, ("rope", "learned")),
        ("mlp", c.mlp, ("gated", "plain")),
        ("activation", c.activation, tuple(ACTIVATIONS)),
    ):
        if value not in known:
            raise ModelError(f"{name} {value!r} is not known", f"use one of {', '.join(known)}")
    rope_frequencies(c)


def rope_frequencies(c: DecoderConfig) -> Tensor:
    """Angular frequencies (head_dim / 2) in float64: base^(-2i/d), scaled as the configuration says.

    linear: divided by the factor; llama3: low frequencies divided, high ones kept, a ramp between (Llama 3.1).
    """
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
    frequency = c.rope_base**-exponent
    scaling = c.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", None):
        return frequency
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / scaling["factor"])
    raise ModelError(f"rope scaling {kind!r} is not known", "use a model with default, linear or llama3 scaling")
