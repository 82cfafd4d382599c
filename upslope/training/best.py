"""The best model of a stage by a validation metric: its checkpoint is kept, the stage hands it on, and may end early.

What was measured, when, and which was best is in the state, so that a resumed run agrees. A best model is an ordinary
checkpoint, saved the moment it is found; it stays as long as a checkpoint that calls it the best (checkpoint.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from upslope.checkpoint import checkpoint_at
from upslope.config.metrics import falls
from upslope.errors import RunError
from upslope.training.run import Run
from upslope.training.state import RunState

SMALLER = ("valid/loss", "valid/perplexity")  # is better


@dataclass(frozen=True)
class Best:
    """By which metric a stage's models are compared, none where the last is handed on; and after how many measurements
    in a row without a better one the stage ends, none where it never does."""

    metric: str | None
    patience: int | None

    @property
    def smaller(self) -> bool:
        name = self.metric or ""
        return name in SMALLER or falls(name.removeprefix("task/"))

    def saw(self, run: Run, state: RunState, at: int, metrics: Mapping[str, float]) -> None:
        """Take in what was measured after `at` steps; the first of the best ones is saved. One that is no number never
        is the best."""
        if self.metric is None:
            return
        value, best = metrics.get(self.metric, math.nan), state.extra.get("best")
        sign = -1.0 if self.smaller else 1.0
        if math.isfinite(value) and (best is None or sign * value > sign * best["value"]):
            state.extra["best"] = {"at": at, "step": state.step, "value": value, "metrics": dict(metrics)}
            state.extra["no_better"] = 0
            state.save(run)
        else:
            state.extra["no_better"] = state.extra.get("no_better", 0) + 1

    def over(self, run: Run, state: RunState, at: int, steps: int) -> bool:
        """Whether the stage has had all its steps, or its patience is at an end."""
        if at >= steps:
            return True
        worse = state.extra.get("no_better", 0)
        if self.patience is None or worse < self.patience:
            return False
        run.account(
            f"{state.stage}: ends after step {at} of {steps}, {self.metric} no better {worse} times", state.stage
        )
        return True

    def hand_on(self, run: Run, state: RunState) -> dict[str, float]:
        """Put the best weights into the stage's model. Returns what was measured of them; nothing where the last are
        handed on: they are the best, none was asked for, or its checkpoint is damaged, which is an alarm."""
        best = state.extra.get("best")
        if best is None:
            return {}
        if best["step"] != state.step:
            try:
                state.take_model(checkpoint_at(state.checkpoints(run), best["step"]))
            except RunError as error:
                message = f"the best model is lost and the last one handed on: {error.what}"
                run.record("alarm", stage=state.stage, step=best["at"], name="best_lost", message=message)
                return {}
        run.account(
            f"{state.stage}: hands on the model after step {best['at']}, {self.metric} {best['value']:.4g}", state.stage
        )
        return best["metrics"] | {"best/step": float(best["at"])}


def due(state: RunState, steps: int, every: int) -> bool:
    """Whether held-out examples are to be measured after state.step: at the start, every so often, and at the end."""
    return state.extra.get("measured") != state.step and (
        state.step in (0, steps) or bool(every and state.step % every == 0)
    )
