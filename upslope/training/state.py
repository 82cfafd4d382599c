"""All that changes during a stage, in one object: what a checkpoint holds and a resumed run starts from.

Randomness has no state here: every order and every token is drawn from (seed, stage, step, item), so the counters
below are enough. A rollout that is only half used is kept whole.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from upslope.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from upslope.errors import Interrupted, RecipeError
from upslope.models.trunk import Trunk
from upslope.training.run import Run
from upslope.training.update import optimizer_tensors, restore_optimizer


@dataclass
class RunState:
    """Model, optimizer and counters of the stage that runs.

    step counts optimizer steps, rollout finished rollouts; pending holds the tensors of a rollout in use (or what a
    reference said of preference pairs), companion is a model that does not learn but is renewed now and then, and extra
    the small state of controllers, as JSON values.
    """

    stage: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    rollout: int = 0
    pending: dict[str, Tensor] | None = None
    companion: nn.Module | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # spent in this stage before this start
    began: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def save(self, run: Run) -> Path:
        """Write a checkpoint; Ctrl-C and crashes go back to the newest."""
        tensors = {"model": dict(self.model.state_dict()), "optimizer": optimizer_tensors(self.model, self.optimizer)}
        if self.pending is not None:
            tensors["pending"] = self.pending
        if self.companion is not None:
            tensors["companion"] = dict(self.companion.state_dict())
        state = {
            "stage": self.stage,
            "step": self.step,
            "rollout": self.rollout,
            "extra": self.extra,
            "best": (self.extra.get("best") or {}).get("step"),
            "seconds": self.elapsed(),
            "logs": run.log_sizes(),
        }
        start = time.monotonic()
        path = save_checkpoint(self.checkpoints(run), self.step, tensors=tensors, state=state, keep=2)
        self.saved_at = time.monotonic()
        size = sum(file.stat().st_size for file in path.iterdir())
        run.record("checkpoint", stage=self.stage, step=self.step, seconds=self.saved_at - start, bytes=size)
        return path

    def save_if_due(self, run: Run) -> None:
        if time.monotonic() - self.saved_at >= 60 * run.recipe.checkpoint_minutes:
            self.save(run)

    def restore(self, run: Run) -> bool:
        """Take up the newest good checkpoint of this stage, if there is one."""
        checkpoint: Checkpoint | None = load_checkpoint(self.checkpoints(run))
        if checkpoint is None:
            run.at_stake = True
            return False
        for skipped in checkpoint.skipped:
            run.terminal.note(f"damaged checkpoint left aside: {skipped}")
        self.take_model(checkpoint)
        restore_optimizer(self.model, self.optimizer, checkpoint.tensors("optimizer"))
        if self.companion is not None:
            self.companion.load_state_dict(checkpoint.tensors("companion"))
        state = checkpoint.state
        self.step, self.rollout, self.extra = state["step"], state["rollout"], state["extra"]
        self.seconds = state["seconds"]
        self.pending = checkpoint.tensors("pending") if checkpoint.has("pending") else None
        run.at_stake = True
        run.terminal.note(f"{self.stage}: carries on after optimizer step {self.step}")
        return True

    def take_model(self, checkpoint: Checkpoint) -> None:
        """The weights of a checkpoint, and nothing else of it."""
        self.model.load_state_dict(checkpoint.tensors("model"))

    def checkpoints(self, run: Run) -> Path:
        return run.stage_folder(self.stage) / "checkpoints"

    def interrupt(self, run: Run) -> NoReturn:
        """Save and raise Interrupted."""
        self.save(run)
        raise Interrupted(
            f"stopped in {self.stage} after optimizer step {self.step}, saved", "the same command carries on"
        )

    def finish(self, run: Run, metrics: dict[str, float]) -> dict[str, float]:
        """Close the stage: its record is written and its checkpoints, which nothing needs any more, go."""
        metrics = metrics | {"time/stage_s": self.elapsed()}
        run.record("stage", stage=self.stage, status="end", seconds=self.elapsed(), metrics=metrics)
        run.mark_done(self.stage, metrics)
        run.at_stake = False
        shutil.rmtree(self.checkpoints(run), ignore_errors=True)
        return metrics


def freeze_lowest(model: Trunk, layers: int) -> None:
    """Leave the embeddings and the lowest `layers` blocks as they are; 0 trains everything."""
    if layers > len(model.blocks):
        raise RecipeError(f"freeze_layers = {layers}: the model has {len(model.blocks)} blocks", "lower it")
    for parameter in model.lowest(layers) if layers else ():
        parameter.requires_grad_(False)
