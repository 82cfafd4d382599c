"""A language model on a long short-term memory (Hochreiter and Schmidhuber 1997; forget gates of Gers et al. 2000).

    x_t = sqrt(D) embed(token)                                          (a tied embedding is small: Vaswani et al. 2017)
    i, f, g, o = W x_t + U h_(t-1) + b                                  of each layer
    c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g),   h_t = sigmoid(o) tanh(c_t)
    logits = h_t of the last layer times head^T

Nothing but a sequence's own tokens advances its state; one that names a parent goes on from the parent's last state.
Products are in `compute_dtype`, gates and states in fp32: a cell that adds up small amounts would lose them in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upslope.kernels.products import MIN_ROWS
from upslope.models.folder import load_folder, save_folder
from upslope.models.recurrence import Steps, cell, in_order_of_time, recur
from upslope.models.runner import sum_of_words
from upslope.models.trunk import Trunk, check_context
from upslope.ragged import Ragged

MODEL_TYPE = "upslope_lstm"


@dataclass(frozen=True)
class LSTMConfig:
    """The shape of an LSTM: width is that of the embedding, of every layer, and of the state."""

    vocab_size: int
    width: int
    layers: int
    context: int
    tied: bool = True


class Layer(nn.Module):
    """One layer's weights: into the gates from below (4D x D), from the state before (4D x D), and their bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.empty(4 * width, width))
        self.recurrent = nn.Parameter(torch.empty(4 * width, width))
        self.bias = nn.Parameter(torch.empty(4 * width))

    def weights(self, dtype: torch.dtype) -> Weights:
        """Products in dtype, the bias in the dtype of states."""
        return self.input.to(dtype), self.recurrent.to(dtype), self.bias.to(_wide(dtype))


Weights = tuple[Tensor, Tensor, Tensor]
States = tuple[Tensor, Tensor]  # h, c


class LSTM(Trunk):
    """A recurrent language model over ragged batches."""

    config: LSTMConfig

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Layer(config.width) for _ in range(config.layers))
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """weight_VD of the projection to logits."""
        return self.embed.weight if self.head is None else self.head.weight

    def hidden(self, batch: Ragged) -> Tensor:
        """hidden_ND: the last layer's state after each token, in compute_dtype. Raises ModelError beyond context."""
        check_context(batch, self.config.context)
        steps = in_order_of_time(batch, self.device)
        weights = [block.weights(self.compute_dtype) for block in self.blocks]  # type: ignore[operator]
        hidden_ND, _ = through_layers(_scaled(self.embed(batch.ids_N).to(self.compute_dtype)), weights, steps)
        return hidden_ND

    def init_weights(self, seed: int) -> LSTM:
        """Uniform in +-1 / sqrt(width), forget biases 1 (Jozefowicz et al. 2015), from a seed alone."""
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.config.width)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim >= 2:
                    parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
                else:
                    parameter.zero_()
                    parameter[self.config.width : 2 * self.config.width] = 1.0
        return self


def _scaled(x_ND: Tensor) -> Tensor:
    return x_ND * math.sqrt(x_ND.shape[1])


def through_layers(x_ND: Tensor, layers: Sequence[Weights], steps: Sequence[Steps]) -> tuple[Tensor, list[States]]:
    """Every layer over a batch: the last one's states in the dtype of x, and (h_ND, c_ND) of each."""
    states: list[States] = []
    for into, recurrent, bias in layers:
        pre = F.linear(x_ND, into).to(bias.dtype) + bias
        states.append(recur(pre, recurrent, steps))
        x_ND = states[-1][0].to(x_ND.dtype)
    return x_ND, states


@dataclass
class LSTMCache:
    """The states (layers, slots, D) that each slot's tokens have led to."""

    h: Tensor
    c: Tensor

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        for state in (self.h, self.c):
            state[:, target] = state[:, source]


class LSTMRunner:
    """Prefill and single steps of an LSTM, without gradients."""

    needs_source = False

    @torch.no_grad()
    def __init__(self, model: LSTM, *, dtype: torch.dtype) -> None:
        self.config = model.config
        self.dtype = dtype
        self.device = model.device
        self.load(model)

    @torch.no_grad()
    def load(self, model: LSTM) -> None:
        """Take over the model's present weights."""
        self.embed, self.output_weight, self.layers = _copied(model, self.dtype)

    def checksum(self) -> str:
        """A number that changes when any weight does, as `checksum_of` makes it of a model."""
        return _checksum(self.embed, self.output_weight, self.layers)

    @torch.no_grad()
    def checksum_of(self, model: LSTM) -> str:
        """The checksum that this runner has when a model's present weights have reached it."""
        return _checksum(*_copied(model, self.dtype))

    def new_cache(self, slots: int, capacity: int) -> LSTMCache:
        """A state for each slot: it has one size, whatever the capacity."""
        shape = (self.config.layers, slots, self.config.width)
        return LSTMCache(*(torch.zeros(shape, dtype=_wide(self.dtype), device=self.device) for _ in range(2)))

    @torch.no_grad()
    def prefill(self, cache: LSTMCache, prompts: Ragged, slots: Sequence[Sequence[int]]) -> Tensor:
        """Compute each prompt once, its last state into every slot listed for it; hidden_PD of the last tokens."""
        x_ND = _scaled(F.embedding(prompts.ids_N.to(self.device), self.embed))
        hidden_ND, states = through_layers(x_ND, self.layers, in_order_of_time(prompts, self.device))
        last_P = prompts.last.to(self.device)
        for number, (h_ND, c_ND) in enumerate(states):
            for place, chosen in zip(last_P.tolist(), slots, strict=True):
                cache.h[number, list(chosen)] = h_ND[place]
                cache.c[number, list(chosen)] = c_ND[place]
        return hidden_ND[last_P]

    @torch.no_grad()
    def step(self, cache: LSTMCache, ids_S: Tensor) -> Tensor:
        """Append one token to each of the slots 0 to n - 1: hidden_SD."""
        n = len(ids_S)
        pad = (0, 0, 0, max(0, MIN_ROWS - n))
        x = F.pad(_scaled(F.embedding(ids_S.to(self.device), self.embed)), pad)
        for number, (into, recurrent, bias) in enumerate(self.layers):
            pre = F.linear(x, into).to(bias.dtype) + bias
            gates = pre + F.linear(F.pad(cache.h[number, :n], pad).to(self.dtype), recurrent).to(bias.dtype)
            _, cache.c[number, :n], cache.h[number, :n] = cell(gates[:n], cache.c[number, :n])
            x = F.pad(cache.h[number, :n], pad).to(self.dtype)
        return x[:n]


def load_lstm(folder: Path, *, dtype: torch.dtype = torch.float32) -> LSTM:
    """Read what `save_lstm` wrote. Raises ModelError for what is missing, extra, damaged or cannot be."""
    return load_folder(folder, LSTM, LSTMConfig, dtype)


def save_lstm(model: LSTM, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    save_folder(model, MODEL_TYPE, folder)


def _copied(model: LSTM, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Weights]]:
    embed = model.embed.weight.detach().to(dtype, copy=True)
    output = embed if model.head is None else model.head.weight.detach().to(dtype, copy=True)
    layers = [tuple(w.detach().clone() for w in block.weights(dtype)) for block in model.blocks]  # type: ignore[operator]
    return embed, output, layers  # type: ignore[return-value]


def _checksum(embed: Tensor, output: Tensor, layers: Sequence[Weights]) -> str:
    parts: list[tuple[int, Tensor | None]] = [(0, embed), (1, None if output is embed else output)]
    parts += [(3 * number + k, w) for number, weights in enumerate(layers, 1) for k, w in enumerate(weights)]
    return sum_of_words(parts)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states: fp32, or more where products have more."""
    return torch.promote_types(dtype, torch.float32)
