"""A reward function of the user's, called in a worker process, chunk by chunk, with a time limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from upslope.errors import RewardError
from upslope.rewards.pool import Worker, WorkerFailed
from upslope.rewards.types import RewardOutput

CHUNK = 64


class FunctionReward:
    """`reward(prompts, completions, rows) -> scores` from "module:function", "file.py:function" or a callable.

    A chunk that raises, hangs or kills its process is tried again in halves, so that only the rows to blame fail:
    one bad row among n costs about 2 log n calls.
    A wrong number of scores, or a function that cannot be loaded, raises RewardError: no row is to blame.
    """

    def __init__(
        self, source: str | Callable[..., Any], *, name: str, timeout_s: float = 30.0, chunk: int = CHUNK
    ) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.chunk = chunk
        self.worker = Worker(source, name)
        self.worker.start()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> RewardOutput:
        score_B = np.full(len(completions), np.nan)
        failure_B: list[str | None] = [None] * len(completions)
        for start in range(0, len(completions), self.chunk):
            part = list(range(start, min(start + self.chunk, len(completions))))
            self._score(part, prompts, completions, rows, score_B, failure_B)
        return RewardOutput(score_B, failure_B)

    def close(self) -> None:
        self.worker.stop()

    def _score(
        self,
        part: list[int],
        prompts: Sequence[str],
        completions: Sequence[str],
        rows: Sequence[dict[str, Any]],
        score_B: np.ndarray,
        failure_B: list[str | None],
    ) -> None:
        chunk = ([prompts[i] for i in part], [completions[i] for i in part], [rows[i] for i in part])
        try:
            scores = self.worker.ask(chunk, self.timeout_s)
        except WorkerFailed as error:
            if len(part) == 1:
                failure_B[part[0]] = str(error)
                return
            for half in (part[: len(part) // 2], part[len(part) // 2 :]):
                self._score(half, prompts, completions, rows, score_B, failure_B)
            return
        if len(scores) != len(part):
            raise RewardError(
                f"reward {self.name} returned {len(scores)} scores for {len(part)} completions",
                "return one number for each completion, in their order",
            )
        for i, score in zip(part, scores, strict=True):
            failure_B[i] = _problem(score)
            if failure_B[i] is None:
                score_B[i] = float(score)


def _problem(score: Any) -> str | None:
    if isinstance(score, bool | int | float):
        return None if math.isfinite(score) else f"returned {score}"
    return f"returned {score!r:.80}, not a number"
