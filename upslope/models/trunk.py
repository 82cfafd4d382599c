"""What every model kind is to the loops, and what its runner is to the engine. Nothing above knows a kind by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from upslope.errors import ModelError
from upslope.ragged import Ragged


class Shape(Protocol):
    """The numbers of a configuration that every kind has."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def context(self) -> int: ...


class Trunk(nn.Module):
    """Hidden states of ragged batches, and the projection that makes logits of them.

    blocks: the layers from the lowest up, as freeze_layers counts them; what stands below them is named embed or
    position. Parameters stay in their own dtype; products are in compute_dtype. No dropout.
    """

    needs_source: ClassVar[bool] = False  # every prompt must be a parent row, its completion the child
    masks: ClassVar[bool] = False  # pretrained on masked tokens, for it sees both ways
    remark: ClassVar[str] = ""  # what whoever loads one is told, once
    config: Shape
    compute_dtype: torch.dtype
    blocks: nn.ModuleList

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def context(self) -> int:
        """How many tokens of a sequence it sees."""
        return self.config.context

    @property
    def output_weight(self) -> Tensor:
        """weight_VD of the projection to logits."""
        raise NotImplementedError

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype in which hidden states are projected to logits."""
        return self.compute_dtype

    def hidden(self, batch: Ragged) -> Tensor:
        """hidden_ND in output_dtype: the state at `batch.previous[n]` predicts token n.

        Raises ModelError beyond the context.
        """
        raise NotImplementedError

    def init_weights(self, seed: int) -> Self:
        """New weights, from a seed alone."""
        raise NotImplementedError

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of what a classifier chooses from; none for a model that writes."""
        return ()

    @property
    def separator(self) -> int | None:
        """The token that ends each passage of a source, for a classifier that chooses among these."""
        return None

    def take_labels(self, labels: tuple[str, ...], separator: int | None = None) -> None:
        """Choose among these from now on; separator: the token that ends each passage of a source, where the labels are
        the numbers of its passages. Raises ModelError for a model that writes."""
        key = "data.classes" if separator is None else "data.passages"
        raise ModelError(f"{key} is set, and the model is no encoder", "remove it, or choose an encoder")

    def lowest(self, layers: int) -> list[nn.Parameter]:
        """The parameters of the embeddings and of the lowest blocks."""
        return [p for name, p in self.named_parameters() if _is_low(name, layers)]


def _is_low(name: str, layers: int) -> bool:
    part, _, rest = name.partition(".")
    return part in ("embed", "position") or (part == "blocks" and int(rest.partition(".")[0]) < layers)


def check_context(batch: Ragged, context: int) -> None:
    """Raise ModelError for a sequence longer than a model's context."""
    longest = max((a + b for a, b in zip(batch.lengths, batch.prefix_lengths, strict=True)), default=0)
    if longest > context:
        raise ModelError(f"a sequence of {longest} tokens exceeds the model's context of {context}", "shorten it")


def tokens_seen(needs_source: bool, prompt: int, completion: int) -> int:
    """How many tokens a context must hold: a source and what is written to it have one each."""
    return max(prompt, completion) if needs_source else prompt + completion


def draw_normal(model: nn.Module, seed: int, deviation: float, residual: float | None = None) -> None:
    """Normal weights from a seed alone; norms 1, biases 0. residual: the deviation of products into the residual."""
    generator = torch.Generator().manual_seed(seed)
    into_residual = deviation if residual is None else residual
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                std = into_residual if ".o." in name or ".down." in name else deviation
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)


class Cache(Protocol):
    """What a runner keeps of each slot's tokens; live slots are always 0 to n - 1."""

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        ...


class Runner(Protocol):
    """A trunk for generation, without gradients, its weights copied in the dtype of products."""

    needs_source: bool  # as the trunk's
    config: Any  # a Shape
    device: torch.device
    output_weight: Tensor

    def load(self, model: Any) -> None:
        """Take over a model's present weights, in place."""
        ...

    def checksum(self) -> str:
        """A number that changes when any weight does."""
        ...

    def checksum_of(self, model: Any) -> str:
        """The checksum that this runner has when a model's present weights have reached it."""
        ...

    def new_cache(self, slots: int, capacity: int) -> Any:
        """A Cache with room for `capacity` tokens in each of `slots`."""
        ...

    def prefill(self, cache: Any, prompts: Ragged, slots: Sequence[Sequence[int]]) -> Tensor:
        """Compute each prompt once, into every slot listed for it: hidden_PD of each prompt's last token."""
        ...

    def step(self, cache: Any, ids_S: Tensor) -> Tensor:
        """Append one token to each of the slots 0 to n - 1: hidden_SD."""
        ...
