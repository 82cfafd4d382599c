"""Scores and failures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class RewardOutput:
    """score_B: fp64, nan where it failed; failure_B: the reason there, None elsewhere. A failure is never a 0."""

    score_B: np.ndarray
    failure_B: list[str | None]
