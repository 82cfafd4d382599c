"""An encoder-decoder for generation: a copy of its weights in the compute dtype, and two caches by slot.

The keys and values that a decoder looks across to are computed once for a prompt, with the prompt, and written to each
slot of its samples; those of its own tokens grow with every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.kernels.products import MIN_ROWS
from upslope.models.copied import CopiedRunner
from upslope.models.encdec import EncDec, EncDecConfig, Seats
from upslope.ragged import Ragged


@dataclass
class EncDecCache:
    """Keys and values (layers, slots, heads, tokens, head_dim) of own tokens and of the source; how many of each."""

    keys: Tensor
    values: Tensor
    source_keys: Tensor
    source_values: Tensor
    length: list[int]
    source_length: list[int]

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        n = self.source_length[source]
        self.forget(slice(None), target, n)
        self.source_length[target] = n
        self.source_keys[:, target, :, :n] = self.source_keys[:, source, :, :n]
        self.source_values[:, target, :, :n] = self.source_values[:, source, :, :n]
        self.copy_own(source, target)

    def forget(self, layer: int | slice, slot: int, n: int) -> None:
        """Zeros where a slot held tokens of its own, and behind the first n of its source: what is masked is read, and
        may be no number."""
        self.keys[layer, slot, :, : self.length[slot]] = 0
        self.values[layer, slot, :, : self.length[slot]] = 0
        self.source_keys[layer, slot, :, n : self.source_length[slot]] = 0
        self.source_values[layer, slot, :, n : self.source_length[slot]] = 0

    def copy_own(self, source: int, target: int) -> None:
        """The tokens written so far; the slots' sources are the same."""
        n = self.length[target] = self.length[source]
        self.keys[:, target, :, :n] = self.keys[:, source, :, :n]
        self.values[:, target, :, :n] = self.values[:, source, :, :n]


class EncDecRunner(CopiedRunner[EncDec]):
    """Prefill and single steps of an encoder-decoder, without gradients."""

    config: EncDecConfig

    def new_cache(self, slots: int, capacity: int) -> EncDecCache:
        """Room for a source and a completion of `capacity` tokens together in each of `slots`."""
        c = self.config.decoder
        shape = (c.layers, slots, c.heads, capacity + len(self.config.start_ids), c.head_dim)

        def room() -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return EncDecCache(room(), room(), room(), room(), [0] * slots, [0] * slots)

    @torch.no_grad()
    def prefill(self, cache: EncDecCache, prompts: Ragged, slots: Sequence[Sequence[int]]) -> Tensor:
        """Encode each prompt once, begin its completion, and write both caches into every slot listed for it.

        Returns hidden_PD, behind the final norm, of each prompt's last start token.
        """
        memory = self.model.encode(Seats(prompts.to(self.device), self.config.start_ids))
        for number, block in enumerate(self.model.decoder.blocks):
            keys, values = block.across.keys_values(memory)  # type: ignore[union-attr, operator]
            for p, chosen in enumerate(slots):
                rows, length = slice(prompts.starts[p], prompts.starts[p + 1]), prompts.lengths[p]
                for slot in chosen:
                    cache.forget(number, slot, length)
                    cache.source_keys[number, slot, :, :length] = keys[rows].transpose(0, 1)
                    cache.source_values[number, slot, :, :length] = values[rows].transpose(0, 1)
        first = [chosen[0] for chosen in slots]
        for p, chosen in enumerate(slots):
            for slot in chosen:
                cache.length[slot], cache.source_length[slot] = 0, prompts.lengths[p]
        hidden = memory
        for token in self.config.start_ids:
            hidden = self._advance(cache, torch.full((len(first),), token), first)
        for chosen in slots:
            for slot in chosen[1:]:
                cache.copy_own(chosen[0], slot)
        return hidden

    @torch.no_grad()
    def step(self, cache: EncDecCache, ids_S: Tensor) -> Tensor:
        """Append one token to each of the slots 0 to n - 1 and return hidden_SD, behind the final norm."""
        return self._advance(cache, ids_S, None)

    def _advance(self, cache: EncDecCache, ids_R: Tensor, slots: Sequence[int] | None) -> Tensor:
        """One token for each of these slots; None: for the first ones, whose caches are read where they lie."""
        model, n = self.model, len(ids_R)
        rows = max(n, MIN_ROWS)
        chosen = range(n) if slots is None else slots
        place_R = torch.tensor(list(chosen), device=self.device)
        where: slice | Tensor = slice(0, n) if slots is None else place_R
        length_R = torch.tensor([cache.length[s] for s in chosen], device=self.device)
        own = _visible(length_R + 1)
        bias = model.decoder.bias(length_R[:, None], own.shape[-1])
        own = own if bias is None else own + bias
        source = _visible(torch.tensor([cache.source_length[s] for s in chosen], device=self.device))
        ids, positions = (F.pad(x.to(self.device), (0, rows - n)) for x in (ids_R, length_R))
        x = model.embed_at(model.decoder, ids, positions)
        for number, block in enumerate(model.decoder.blocks):
            layer = (cache.keys[number], cache.values[number])

            def mix(q: Tensor, k: Tensor, v: Tensor, layer: tuple[Tensor, Tensor] = layer) -> Tensor:
                for room, new in zip(layer, (k, v), strict=True):
                    room[place_R, :, length_R] = new[:n]
                return self._look(q, layer[0][where], layer[1][where], own)

            across = partial(
                self._look,
                keys=cache.source_keys[number][where],
                values=cache.source_values[number][where],
                bias=source,
            )
            x = block(x, mix, across)
        for slot in chosen:
            cache.length[slot] += 1
        return model.decoder.leave(x)[:n]

    def _look(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """One query a row: q (rows, heads, d) -> as q; keys and values (n, heads, tokens, d), bias in fp32."""
        n, longest = len(keys), bias.shape[-1]
        scores = torch.matmul(q[:n, :, None], keys[:, :, :longest].transpose(-1, -2)).float()
        weights = torch.softmax(torch.add(bias, scores, alpha=self.config.decoder.scale), dim=-1).to(self.dtype)
        mixed = torch.matmul(weights, values[:, :, :longest])[:, :, 0]
        return F.pad(mixed, (0, 0, 0, 0, 0, len(q) - n))


def _visible(length_R: Tensor) -> Tensor:
    """(R, 1, 1, longest) in fp32: 0 where a row's tokens lie, -inf beyond them."""
    allowed = torch.arange(int(length_R.max()), device=length_R.device) < length_R[:, None]
    mask = torch.zeros(allowed.shape, device=length_R.device).masked_fill_(~allowed, float("-inf"))
    return mask[:, None, None, :]
