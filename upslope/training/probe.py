"""A second judge that no policy trains on: a linear probe on a sentence encoder, where one is installed.

    score = P(label is the preferred one | mean of the encoder's last hidden states), by logistic regression

The encoder (encoder.py) is of another family than any policy here. It is frozen; the probe is fitted on labelled rows
of the training side and reported with its held-out accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from upslope.algo.random import permutation
from upslope.rewards.types import RewardOutput
from upslope.training.encoder import SentenceEncoder
from upslope.training.episode import Episode

ROWS = 2000


class ProbeSource:
    """Scores whole texts, prompt and completion, with a probe fitted on labelled rows. accuracy is on `held_out`."""

    name = "minilm probe"

    def __init__(
        self, folder: Path, rows: Dataset, held_out: Dataset, *, text: str, label: str, prefer: str, seed: int
    ) -> None:
        self.embed = SentenceEncoder(folder)
        chosen = rows.select(permutation(len(rows), seed, "probe")[:ROWS])
        features_BD, target_B = self._labelled(chosen, text, label, prefer)
        self.mean = features_BD.mean(0)
        self.weight = _fit((features_BD - self.mean), target_B)
        tested = held_out.select(range(min(len(held_out), ROWS // 2)))
        features_BD, target_B = self._labelled(tested, text, label, prefer)
        self.accuracy = float(((self._logit(features_BD) > 0) == (target_B > 0.5)).float().mean())

    def __call__(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> RewardOutput:
        texts = [e.prompt + e.completion for e in episodes]
        return RewardOutput(torch.sigmoid(self._logit(self.embed(texts))).numpy(), [None] * len(texts))

    def close(self) -> None:
        """Nothing to end: the encoder lives in this process."""

    def _labelled(self, rows: Dataset, text: str, label: str, prefer: str) -> tuple[Tensor, Tensor]:
        known = [i for i, value in enumerate(rows[label]) if value not in (None, "")]  # as pairs are made of labels
        rows = rows.select(known)
        return self.embed(rows[text]), torch.tensor([float(str(value) == prefer) for value in rows[label]])

    def _logit(self, features_BD: Tensor) -> Tensor:
        return (features_BD - self.mean) @ self.weight[:-1] + self.weight[-1]


def _fit(features_BD: Tensor, target_B: Tensor, ridge: float = 1e-3) -> Tensor:
    """Logistic regression with a bias as the last weight, by L-BFGS."""
    weight = torch.zeros(features_BD.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logit = features_BD @ weight[:-1] + weight[-1]
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(logit, target_B) + ridge * weight[:-1].square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()
