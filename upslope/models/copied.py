"""A runner on a copy of its model: what it must hold of weights, for any kind that generates by its own modules."""

from __future__ import annotations

from copy import deepcopy
from typing import Generic, TypeVar

import torch

from upslope.models.runner import sum_of_words
from upslope.models.trunk import Trunk

Kind = TypeVar("Kind", bound=Trunk)


class CopiedRunner(Generic[Kind]):
    """A copy of a model in the dtype of products, without gradients, and its projection to logits.

    Norms, and the relative bias of fp32 scores, are held in fp32, as the trainer uses them.
    """

    @torch.no_grad()
    def __init__(self, model: Kind, *, dtype: torch.dtype) -> None:
        self.needs_source = model.needs_source
        self.config = model.config
        self.dtype = dtype
        self.device = model.device
        self.model: Kind = deepcopy(model).requires_grad_(False)
        self.model.compute_dtype = dtype
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(_held_in(name, dtype))
        self.output_weight = model.output_weight.detach().to(self.model.output_dtype, copy=True)

    @torch.no_grad()
    def load(self, model: Kind) -> None:
        """Take over the model's present weights, in place."""
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
        self.output_weight.copy_(model.output_weight)

    def checksum(self) -> str:
        """A number that changes when any weight does, as `checksum_of` makes it of a model."""
        return sum_of_words([*enumerate(self.model.parameters(), 1), (0, self.output_weight)])

    @torch.no_grad()
    def checksum_of(self, model: Kind) -> str:
        """The checksum that this runner has when a model's present weights have reached it."""
        parts = [(n, p.to(_held_in(name, self.dtype))) for n, (name, p) in enumerate(model.named_parameters(), 1)]
        return sum_of_words([*parts, (0, model.output_weight.to(self.model.output_dtype))])


def _held_in(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if "norm." in name or ".relative." in name or name == "sharpness" else dtype
