"""Scores and failures."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class RewardOutput:
    """score_B: fp64, nan where it failed; failure_B: the reason there, None elsewhere. A failure is never a 0.

    step_B: episode -> its steps (end, score), where the reward paid single steps: `end` is how many characters of the
    completion had been written when the step was done, and score_B the sum of them.
    """

    score_B: np.ndarray
    failure_B: list[str | None]
    step_B: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
