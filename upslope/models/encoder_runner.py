"""An encoder for choosing labels: one pass over the prompts, and no step after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.copied import CopiedRunner
from upslope.models.encoder import Encoder
from upslope.ragged import Ragged


class NoCache:
    """An action of one token leaves nothing to keep."""

    def move(self, source: int, target: int) -> None:
        """Nothing lies in a slot."""


class EncoderRunner(CopiedRunner[Encoder]):
    """The pooled state of each prompt, without gradients. Raises ModelError for an encoder that has no labels."""

    def new_cache(self, slots: int, capacity: int) -> NoCache:
        return NoCache()

    @torch.no_grad()
    def prefill(self, cache: NoCache, prompts: Ragged, slots: Sequence[Sequence[int]]) -> Tensor:
        """hidden_P(D + 1) of each prompt."""
        return self.model.pooled(prompts.to(self.device))

    def step(self, cache: NoCache, ids_S: Tensor) -> Tensor:
        """Raises ModelError: a label is the whole answer."""
        raise ModelError("an encoder chooses one label and writes no text after it", "ask an encoder-decoder to write")
