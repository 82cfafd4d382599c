"""A reward function of the user's, called in a worker process, chunk by chunk, with a time limit."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from upslope.errors import RewardError
from upslope.rewards.pool import Worker, WorkerFailed
from upslope.rewards.types import RewardOutput

CHUNK = 64
LOST_LIMIT = 16  # hangs and deaths in one batch, each of which costs the time limit or a new process


class FunctionReward:
    """`reward(prompts, completions, rows) -> scores` from "module:function", "file.py:function" or a callable.

    A chunk that fails is tried again after the others, so that only the rows to blame fail: in halves if it raised
    (one bad row among n costs about 2 log n calls), row by row if it hung, filled its memory or killed its process,
    for that is dear.
    After LOST_LIMIT hangs and deaths in one batch the rows still without a score fail untried.
    Raises Interrupted when should_stop answers yes while it waits.
    A score is a number, or a list of steps (end, number): what was earned when `end` characters had been written.
    A wrong number of scores, or a function that cannot be loaded, raises RewardError: no row is to blame.
    """

    def __init__(
        self,
        source: str | Callable[..., Any],
        *,
        name: str,
        timeout_s: float = 30.0,
        memory_gb: float = 8.0,
        should_stop: Callable[[], bool] | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.chunk = chunk
        self.worker = Worker(source, name, memory_gb=memory_gb, should_stop=should_stop)
        self.worker.start()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> RewardOutput:
        count = len(completions)
        output = RewardOutput(np.full(count, np.nan), [None] * count)
        todo = deque(list(range(start, min(start + self.chunk, count))) for start in range(0, count, self.chunk))
        lost = 0
        while todo:
            part = todo.popleft()
            try:
                self._score(part, prompts, completions, rows, output)
            except WorkerFailed as error:
                if error.again:
                    todo.append(part)
                    continue
                lost += error.lost
                if len(part) == 1:
                    output.failure_B[part[0]] = str(error)
                elif error.lost:
                    todo.extend([i] for i in part)
                else:
                    todo.extend((part[: len(part) // 2], part[len(part) // 2 :]))
                if lost >= LOST_LIMIT:
                    for i in (i for part in todo for i in part):
                        output.failure_B[i] = f"not tried after {lost} hangs or deaths, the last: {error}"
                    break
        return output

    def close(self) -> None:
        self.worker.stop()

    def _score(
        self,
        part: list[int],
        prompts: Sequence[str],
        completions: Sequence[str],
        rows: Sequence[dict[str, Any]],
        output: RewardOutput,
    ) -> None:
        chunk = ([prompts[i] for i in part], [completions[i] for i in part], [rows[i] for i in part])
        scores = self.worker.ask(chunk, self.timeout_s)
        if len(scores) != len(part):
            raise RewardError(
                f"reward {self.name} returned {len(scores)} scores for {len(part)} completions",
                "return one number for each completion, in their order",
            )
        for i, score in zip(part, scores, strict=True):
            if isinstance(score, list):
                steps = [(end, value) for end, value in score if math.isfinite(end) and math.isfinite(value)]
                if len(steps) < len(score) or any(end < 1 or end != int(end) for end, _ in steps):
                    output.failure_B[i] = f"returned steps {score!r:.80}, not (characters from 1 on, number)"
                    continue
                output.step_B[i] = [(int(end), value) for end, value in steps]
                output.score_B[i] = sum(value for _, value in steps)
            elif isinstance(score, str):
                output.failure_B[i] = f"returned {score}, not a number"
            elif not math.isfinite(score):
                output.failure_B[i] = f"returned {score}"
            else:
                output.score_B[i] = score
