"""A decoder for generation: fused weights in the compute dtype, and a cache of keys and values by slot.

Live slots are always 0 to n - 1, so that a step reads the cache where it lies; the engine moves the last one into a
place that has become free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upslope.models.attention import Layout, attend
from upslope.models.decoder import ACTIVATIONS, Block, Decoder, DecoderConfig, Norm
from upslope.models.ops import rotate
from upslope.ragged import Ragged

MIN_ROWS = 8  # a bf16 product of a single row falls into a slow path on CPUs


@dataclass
class DecoderCache:
    """Keys and values (layers, slots, kv heads, capacity, head_dim) and how many tokens each slot holds."""

    keys: Tensor
    values: Tensor
    length: list[int]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        n = self.length[source]
        self.keys[:, target, :, :n] = self.keys[:, source, :, :n]
        self.values[:, target, :, :n] = self.values[:, source, :, :n]
        self.length[target] = n


class Layer:
    """One block's weights, fused: q, k and v in one product, gate and up in one."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.qkv = self._joined(block.q.weight, block.k.weight, block.v.weight)
        self.gate_up = self._joined(*([block.gate.weight] if block.gate is not None else []), block.up.weight)
        self.o = block.o.weight.detach().to(dtype, copy=True)
        self.down = block.down.weight.detach().to(dtype, copy=True)
        self.small: dict[str, Tensor | None] = {}
        self.load(block)

    def _joined(self, *weights: Tensor) -> Tensor:
        return torch.cat([w.detach().to(self.dtype) for w in weights])

    @torch.no_grad()
    def load(self, block: Block) -> None:
        _copy_into(self.qkv, block.q.weight, block.k.weight, block.v.weight)
        _copy_into(self.gate_up, *([block.gate.weight] if block.gate is not None else []), block.up.weight)
        self.o.copy_(block.o.weight)
        self.down.copy_(block.down.weight)
        bias: list[Tensor] = [m.bias for m in (block.q, block.k, block.v) if m.bias is not None]
        both: list[Tensor] = [m.bias for m in (block.gate, block.up) if m is not None and m.bias is not None]
        self.small = {
            "qkv_bias": torch.cat(bias).to(self.dtype) if bias else None,
            "gate_up_bias": torch.cat(both).to(self.dtype) if both else None,
            "o_bias": block.o.bias.to(self.dtype) if block.o.bias is not None else None,
            "down_bias": block.down.bias.to(self.dtype) if block.down.bias is not None else None,
        }
        self.norms = {
            name: (module.weight.float().clone(), None if module.bias is None else module.bias.float().clone())
            for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")
            if (module := getattr(block, name)) is not None
        }


class DecoderRunner:
    """Prefill and single steps of a decoder, without gradients."""

    needs_source = False

    @torch.no_grad()
    def __init__(self, model: Decoder, *, dtype: torch.dtype) -> None:
        self.config: DecoderConfig = model.config
        self.dtype = dtype
        self.device = model.device
        self.layers = [Layer(block, dtype) for block in model.blocks]  # type: ignore[arg-type]
        self.embed = model.embed.weight.detach().to(dtype, copy=True)
        self.output_weight = self.embed if model.head is None else model.head.weight.detach().to(dtype, copy=True)
        self.load(model)

    @torch.no_grad()
    def load(self, model: Decoder) -> None:
        """Take over the model's present weights, in place."""
        for layer, block in zip(self.layers, model.blocks, strict=True):
            layer.load(block)  # type: ignore[arg-type]
        self.embed.copy_(model.embed.weight)
        if model.head is not None:
            self.output_weight.copy_(model.head.weight)
        self.position = None if model.position is None else model.position.weight.detach().to(self.dtype)
        bias = None if model.norm.bias is None else model.norm.bias.detach().float().clone()
        self.norm = (model.norm.weight.detach().float().clone(), bias)
        everywhere = torch.arange(self.config.context, device=self.device)
        rope = model.rope(everywhere)
        self.rope_table = None if rope is None else tuple(t.to(self.dtype) for t in rope)

    def checksum(self) -> str:
        """A number that changes when any weight does, as `checksum_of` makes it of a model."""
        parts = [(0, self.embed), (1, self.norm[0]), (2, self.norm[1]), (3, self.position)]
        if self.output_weight is not self.embed:
            parts.append((4, self.output_weight))
        for number, layer in enumerate(self.layers, 1):
            parts += [(10 * number + k, w) for k, w in enumerate((layer.qkv, layer.gate_up, layer.o, layer.down))]
            parts += [(10 * number + 4, w) for pair in layer.norms.values() for w in pair]
            parts += [(10 * number + 5, bias) for bias in layer.small.values()]
        return sum_of_words(parts)

    def checksum_of(self, model: Decoder) -> str:
        """The checksum that this runner has when a model's present weights have reached it."""
        return model_checksum(model, self.dtype)

    def new_cache(self, slots: int, capacity: int) -> DecoderCache:
        """Room for `capacity` tokens in each of `slots`."""
        c = self.config
        shape = (c.layers, slots, c.kv_heads, capacity, c.head_dim)
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return DecoderCache(keys, values, [0] * slots)

    @torch.no_grad()
    def prefill(self, cache: DecoderCache, prompts: Ragged, slots: Sequence[Sequence[int]]) -> Tensor:
        """Compute each prompt once and write its keys and values into every slot listed for it.

        Returns hidden_PD, behind the final norm, of each prompt's last token.
        """
        c = self.config
        ids = prompts.ids_N.to(self.device)
        positions = prompts.positions.to(self.device)
        x = self._embed(ids, positions)
        rope = self._rope(positions)
        layout = Layout(prompts, self.device, c.sliding_window)
        for number, layer in enumerate(self.layers):
            q, k, v = self._heads(layer, x, rope)
            for p, chosen in enumerate(slots):
                rows = slice(prompts.starts[p], prompts.starts[p + 1])
                length = prompts.lengths[p]
                keys, values = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
                for slot in chosen:
                    cache.keys[number, slot, :, :length] = keys
                    cache.values[number, slot, :, :length] = values
            x = self._finish(layer, x, attend(q, k, v, layout).reshape(len(x), -1))
        for p, chosen in enumerate(slots):
            for slot in chosen:
                cache.length[slot] = prompts.lengths[p]
        return self._norm(x[prompts.last.to(self.device)], *self.norm)

    @torch.no_grad()
    def step(self, cache: DecoderCache, ids_S: Tensor) -> Tensor:
        """Append one token to each of the slots 0 to n - 1 and return hidden_SD, behind the final norm."""
        c, n = self.config, len(ids_S)
        rows = max(n, MIN_ROWS)
        ids = F.pad(ids_S, (0, rows - n)).to(self.device)
        lengths = torch.tensor(cache.length[:n] + [0] * (rows - n), device=self.device)
        longest = max(cache.length[:n]) + 1
        x = self._embed(ids, lengths)
        rope = self._rope(lengths)
        mask = self._step_mask(lengths[:n], longest)
        slots = torch.arange(n, device=self.device)
        group = c.heads // c.kv_heads
        for number, layer in enumerate(self.layers):
            q, k, v = self._heads(layer, x, rope)
            keys, values = cache.keys[number], cache.values[number]
            keys[slots, :, lengths[:n]] = k[:n]
            values[slots, :, lengths[:n]] = v[:n]
            q = q[:n].reshape(n, c.kv_heads, group, c.head_dim)
            scores = torch.matmul(q, keys[:n, :, :longest].transpose(-1, -2)).float()
            weights = torch.softmax(torch.add(mask, scores, alpha=c.head_dim**-0.5), dim=-1).to(self.dtype)
            mixed = torch.matmul(weights, values[:n, :, :longest]).reshape(n, -1)
            x = self._finish(layer, x, F.pad(mixed, (0, 0, 0, rows - n)))
        for slot in range(n):
            cache.length[slot] += 1
        return self._norm(x[:n], *self.norm)

    def _step_mask(self, lengths: Tensor, longest: int) -> Tensor:
        """(S, 1, 1, longest): 0 where a slot's tokens lie, -inf beyond them or before its window."""
        key = torch.arange(longest, device=self.device)
        allowed = key <= lengths[:, None]
        if self.config.sliding_window is not None:
            allowed &= key > lengths[:, None] - self.config.sliding_window
        mask = torch.zeros(allowed.shape, device=self.device).masked_fill_(~allowed, float("-inf"))
        return mask[:, None, None, :]

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed)
        return x if self.position is None else x + self.position[positions]

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.rope_table is None:
            return None
        cos, sin = self.rope_table
        return cos[positions], sin[positions]

    def _heads(self, layer: Layer, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        joined = F.linear(self._norm(x, *layer.norms["attn_norm"]), layer.qkv, layer.small["qkv_bias"])
        heads = joined.view(len(x), c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = heads[:, : c.heads + c.kv_heads], heads[:, c.heads + c.kv_heads :]
        if "q_norm" in layer.norms:
            q = self._norm(qk[:, : c.heads], *layer.norms["q_norm"])
            k = self._norm(qk[:, c.heads :], *layer.norms["k_norm"])
            qk = torch.cat((q, k), dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        return qk[:, : c.heads], qk[:, c.heads :], v

    def _finish(self, layer: Layer, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + F.linear(mixed, layer.o, layer.small["o_bias"])
        h = F.linear(self._norm(x, *layer.norms["mlp_norm"]), layer.gate_up, layer.small["gate_up_bias"])
        if self.config.mlp == "gated":
            gate, up = h.chunk(2, dim=-1)
            h = ACTIVATIONS[self.config.activation](gate).mul_(up)
        else:
            h = ACTIVATIONS[self.config.activation](h)
        return x + F.linear(h, layer.down, layer.small["down_bias"])

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = x.float()
        if bias is None:
            return F.rms_norm(wide, x.shape[-1:], weight, self.config.norm_eps).to(self.dtype)
        return F.layer_norm(wide, x.shape[-1:], weight, bias, self.config.norm_eps).to(self.dtype)


@torch.no_grad()
def model_checksum(model: Decoder, dtype: torch.dtype) -> str:
    """The checksum that a runner of this dtype has when the model's weights have reached it.

    Made from the model's own tensors, each summed word by word and weighed by its place: a weight that did not
    arrive, or in another layer, changes it. Joined weights (q, k, v) count as one.
    """
    parts: list[tuple[int, Tensor | None]] = [(0, model.embed.weight.to(dtype)), (1, model.norm.weight.float())]
    parts.append((2, None if model.norm.bias is None else model.norm.bias.float()))
    parts.append((3, None if model.position is None else model.position.weight.to(dtype)))
    if model.head is not None:
        parts.append((4, model.head.weight.to(dtype)))
    for number, block in enumerate(model.blocks, 1):
        for name, module in block.named_children():
            if isinstance(module, Norm):
                parts += [(10 * number + 4, None if p is None else p.float()) for p in (module.weight, module.bias)]
                continue
            place = {"q": 0, "k": 0, "v": 0, "gate": 1, "up": 1, "o": 2, "down": 3}[name]
            assert isinstance(module, nn.Linear)
            parts.append((10 * number + place, module.weight.to(dtype)))
            parts.append((10 * number + 5, None if module.bias is None else module.bias.to(dtype)))
    return sum_of_words(parts)


def sum_of_words(parts: Sequence[tuple[int, Tensor | None]]) -> str:
    total = 0
    for place, weight in parts:
        if weight is not None:
            words = weight.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
            total = (total + (2 * place + 3) * int(words.sum(dtype=torch.int64))) % (1 << 61)
    return f"{total:016x}"


def _copy_into(joined: Tensor, *weights: Tensor) -> None:
    start = 0
    for weight in weights:
        joined[start : start + len(weight)].copy_(weight)
        start += len(weight)
