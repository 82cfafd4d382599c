"""A decoder for generation: fused weights in the compute dtype, and a cache of keys and values by slot.

Live slots are always 0 to n - 1, so that a step reads the cache where it lies; the engine moves the last one into a
place that has become free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upslope.kernels import cpu
from upslope.kernels.products import Product, taken
from upslope.kernels.serving import serving
from upslope.models.attention import Layout, attend
from upslope.models.cache import DecoderCache, Entries
from upslope.models.decoder import ACTIVATIONS, Block, Decoder, DecoderConfig, Norm
from upslope.ragged import Ragged, send

NormWeights = tuple[Tensor, Tensor | None]  # weight and bias, in fp32


class Layer:
    """One block's weights, fused: q, k and v in one product, gate and up in one."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.products = {name: Product(*weights, dtype=dtype) for name, weights in _weights(block).items()}
        self.small: dict[str, Tensor | None] = {}
        self.norms: dict[str, NormWeights] = {}
        self._load_small(block)

    @torch.no_grad()
    def load(self, block: Block) -> None:
        for name, weights in _weights(block).items():
            self.products[name].load(*weights)
        self._load_small(block)

    def product(self, name: str, x: Tensor) -> Tensor:
        """x W^T, with its bias where the shape has one."""
        return self.products[name](x, self.small[f"{name}_bias"])

    @torch.no_grad()
    def _load_small(self, block: Block) -> None:
        bias: list[Tensor] = [m.bias for m in (block.q, block.k, block.v) if m.bias is not None]
        both: list[Tensor] = [m.bias for m in (block.gate, block.up) if m is not None and m.bias is not None]
        small = {
            "qkv_bias": torch.cat(bias).to(self.dtype) if bias else None,
            "gate_up_bias": torch.cat(both).to(self.dtype) if both else None,
            "o_bias": block.o.bias.to(self.dtype) if block.o.bias is not None else None,
            "down_bias": block.down.bias.to(self.dtype) if block.down.bias is not None else None,
        }
        self.small = {name: _taken(t, self.small.get(name)) for name, t in small.items()}
        for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm"):
            module = getattr(block, name)
            if module is not None:
                self.norms[name] = _norm_weights(module, self.norms.get(name))


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
        self.position: Tensor | None = None
        self.norm = _norm_weights(model.norm, None)
        self.rope_table = self._rope_table(model)
        self._load_outer(model)

    @torch.no_grad()
    def load(self, model: Decoder) -> None:
        """Take over the model's present weights, in place."""
        for layer, block in zip(self.layers, model.blocks, strict=True):
            layer.load(block)  # type: ignore[arg-type]
        self._load_outer(model)

    def _load_outer(self, model: Decoder) -> None:
        self.embed.copy_(model.embed.weight)
        if model.head is not None:
            self.output_weight.copy_(model.head.weight)
        position = None if model.position is None else model.position.weight.detach().to(self.dtype, copy=True)
        self.position = _taken(position, self.position)
        self.norm = _norm_weights(model.norm, self.norm)
        self.steps = self._steps()

    def _rope_table(self, model: Decoder) -> tuple[Tensor, Tensor] | None:
        """cos and sin of every place, rows of head_dim / 2."""
        rope = model.rope(torch.arange(self.config.context, device=self.device))
        if rope is None:
            return None
        cos, sin = (t[:, 0].to(self.dtype).contiguous() for t in rope)
        return cos, sin

    def _steps(self) -> cpu.Steps | None:
        """What the compiled step is given, where it serves this shape: RMS norms, none of heads, and SwiGLU."""
        c = self.config
        served = c.norm == "rms" and not c.qk_norm and c.mlp == "gated" and c.activation == "silu"
        if not served or any(p.layout != "panels" for layer in self.layers for p in layer.products.values()):
            return None
        table = []
        for layer in self.layers:
            weights = [(p.weight, layer.small[f"{name}_bias"]) for name, p in layer.products.items()]
            tensors = [layer.norms["attn_norm"][0], layer.norms["mlp_norm"][0], *(t for pair in weights for t in pair)]
            table.append([0 if t is None else t.data_ptr() for t in tensors])
        window = c.sliding_window or 0
        sizes = (c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.ffn_width, window)
        return cpu.Steps(*sizes, c.norm_eps, torch.tensor(table), self.norm[0])

    def checksum(self) -> str:
        """A number that changes when any weight does, as `checksum_of` makes it of a model."""
        parts = [(0, self.embed), (1, self.norm[0]), (2, self.norm[1]), (3, self.position)]
        if self.output_weight is not self.embed:
            parts.append((4, self.output_weight))
        for number, layer in enumerate(self.layers, 1):
            parts += [(10 * number + k, p.dense()) for k, p in enumerate(layer.products.values())]
            parts += [(10 * number + 4, w) for pair in layer.norms.values() for w in pair]
            parts += [(10 * number + 5, bias) for bias in layer.small.values()]
        return sum_of_words(parts)

    def checksum_of(self, model: Decoder) -> str:
        """The checksum that this runner has when a model's present weights have reached it."""
        return model_checksum(model, self.dtype)

    def new_cache(self, slots: int, capacity: int) -> DecoderCache:
        """Room for `capacity` tokens in each of `slots`."""
        c = self.config
        return DecoderCache(c.layers, slots, c.kv_heads, capacity, c.head_dim, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def prefill(self, cache: DecoderCache, prompts: Ragged, slots: Sequence[Sequence[int]]) -> Tensor:
        """Compute each prompt once and write its keys and values into every slot listed for it.

        Returns hidden_PD, behind the final norm, of each prompt's last token.
        """
        c = self.config
        positions = send(prompts.positions, self.device)
        x = self._embed(send(prompts.ids_N, self.device), positions)
        added: Tensor | None = None
        rope = self._rope(positions)
        turns = None if rope is None else (rope[0][:, None], rope[1][:, None])
        layout = Layout(prompts, self.device, c.sliding_window)
        entries = [(prompts.starts[p], prompts.lengths[p], slot) for p, chosen in enumerate(slots) for slot in chosen]
        places = Entries(entries, self.device)
        for number, layer in enumerate(self.layers):
            x, h = self._add_norm(x, added, layer.norms["attn_norm"])
            qkv = self._qkv(layer, h)
            cache.write(number, places, qkv, rope, c.heads)
            q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
            mixed = attend(q, k, v, layout, turns).reshape(len(x), -1)
            if layer is self.layers[-1]:  # nobody reads the other tokens' hidden states
                last = send(prompts.last, self.device)
                x, mixed = x[last], mixed[last]
            x, added = self._feed_forward(layer, x, mixed)
        for _, length, slot in entries:
            cache.length[slot] = length
        return self._add_norm(x, added, self.norm)[1]

    @torch.no_grad()
    def step(self, cache: DecoderCache, ids_S: Tensor) -> Tensor:
        """Append one token to each of the slots 0 to n - 1 and return hidden_SD, behind the final norm."""
        n = len(ids_S)
        hidden = self.advance(cache, ids_S.to(self.device), torch.tensor(cache.length[:n], device=self.device))
        for slot in range(n):
            cache.length[slot] += 1
        return hidden

    @torch.no_grad()
    def advance(self, cache: DecoderCache, ids_S: Tensor, lengths_S: Tensor) -> Tensor:
        """`step`, told how many tokens each slot holds. On a GPU the host need know nothing that a later step changes.

        Places beyond the context are as its last one: whoever goes there throws the tokens away.
        """
        c = self.config
        x = self._embed(ids_S, lengths_S)
        added: Tensor | None = None
        rope = self.rope_table if cache.on_gpu else self._rope(lengths_S)
        if self.steps is not None and cache.compiled:
            return cpu.step(self.steps, x, rope, lengths_S, cache.keys, cache.values)
        for number, layer in enumerate(self.layers):
            x, h = self._add_norm(x, added, layer.norms["attn_norm"])
            mixed = cache.attend(number, self._qkv(layer, h), rope, lengths_S, c.heads, c.sliding_window)
            x, added = self._feed_forward(layer, x, mixed)
        return self._add_norm(x, added, self.norm)[1]

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed)
        return x if self.position is None else x + self.position[positions.clamp_max(len(self.position) - 1)]

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin (N, head_dim / 2)."""
        if self.rope_table is None:
            return None
        cos, sin = self.rope_table
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _qkv(self, layer: Layer, h: Tensor) -> Tensor:
        """(N, heads + 2 kv heads, d): queries, keys and values, with their own norms where the shape has them."""
        c = self.config
        heads = layer.product("qkv", h).view(len(h), c.heads + 2 * c.kv_heads, c.head_dim)
        if "q_norm" not in layer.norms:
            return heads
        q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        return torch.cat((self._norm(q, layer.norms["q_norm"]), self._norm(k, layer.norms["k_norm"]), v), dim=1)

    def _feed_forward(self, layer: Layer, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The residual with attention's part in it, and the feed-forward's part, which is still to be added."""
        x, h = self._add_norm(x, layer.product("o", mixed), layer.norms["mlp_norm"])
        h = layer.product("gate_up", h)
        if self.config.mlp == "gated":
            kernels = serving(h) if self.config.activation == "silu" else None
            if kernels is not None:
                h = kernels.swiglu_joined(h)
            else:
                gate, up = h.chunk(2, dim=-1)
                h = ACTIVATIONS[self.config.activation](gate).mul_(up)
        else:
            h = ACTIVATIONS[self.config.activation](h)
        return x, layer.product("down", h)

    def _add_norm(self, x: Tensor, added: Tensor | None, norm: NormWeights) -> tuple[Tensor, Tensor]:
        """x + added, and its norm; x itself may be written to."""
        kernels = serving(x) if norm[1] is None else None
        if kernels is not None:
            return x, kernels.add_norm(x, added, norm[0], self.config.norm_eps)
        x = x if added is None else x + added
        return x, self._norm(x, norm)

    def _norm(self, x: Tensor, norm: NormWeights) -> Tensor:
        weight, bias = norm
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
            place = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}[name]
            assert isinstance(module, nn.Linear)
            parts.append((10 * number + place, module.weight.to(dtype)))
            parts.append((10 * number + 5, None if module.bias is None else module.bias.to(dtype)))
    return sum_of_words(parts)


def sum_of_words(parts: Sequence[tuple[int, Tensor | None]]) -> str:
    """Rows are summed in words of 8 bytes where they are made of such; joined rows give the sum of their parts."""
    weights, sums = [], []
    for place, weight in parts:
        if weight is not None:
            size = weight.element_size()
            whole = weight.ndim > 1 and weight.shape[-1] * size % 8 == 0
            word = torch.int64 if whole else {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
            weights.append(2 * place + 3)
            sums.append(weight.contiguous().view(word).sum(dtype=torch.int64))
    total = sum(by * found for by, found in zip(weights, torch.stack(sums).tolist(), strict=True))
    return f"{total % (1 << 64):016x}"


def _taken(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return None if new is None else taken(new, old)


def _norm_weights(module: Norm, old: NormWeights | None) -> NormWeights:
    weight, bias = old or (None, None)
    own = module.bias
    kept = taken(module.weight.detach().float().clone(), weight)
    return kept, _taken(None if own is None else own.detach().float().clone(), bias)


def _weights(block: Block) -> dict[str, list[Tensor]]:
    """What each product's weight is made of, in the order in which a step needs them."""
    return {
        "qkv": [block.q.weight, block.k.weight, block.v.weight],
        "o": [block.o.weight],
        "gate_up": [*([block.gate.weight] if block.gate is not None else []), block.up.weight],
        "down": [block.down.weight],
    }
