"""The trainer of the soak: `upslope train` as it is, with a meter around it that the program knows nothing of.

    python -m tests.faults.soaked NOTES train RECIPE ...

After every rollout a piece of work is done that is always the same. After every BLOCK of them one line of JSON is noted
in NOTES: the processor time of a rollout (without checkpoints, whose number depends on the clock) and that of the
reference work, each a mean over the block. Neighbours on the machine slow both; what slows the first alone is the
trainer's own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.conftest import tiny_decoder
from upslope import cli
from upslope.algo import token_logprobs
from upslope.config import Optim
from upslope.engine import Engine, Request, Sampling
from upslope.models.open import make_runner
from upslope.ragged import Ragged
from upslope.training.run import Run
from upslope.training.state import RunState
from upslope.training.update import make_optimizer, never, optimizer_step

BLOCK = 20
OBJECTS_S = 30.0  # between two counts of Python's objects, which take as long as some rollouts


class Reference:
    """Always the same work, of a rollout's kind: sampling, a pass forward and backward, an optimizer step, text."""

    def __init__(self) -> None:
        self.model = tiny_decoder(0)
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.optimizer = make_optimizer(self.model, Optim())
        self.batch = Ragged.of([[(7 * s + t) % 31 for t in range(10)] for s in range(6)])
        self.engine = Engine(make_runner(self.model, dtype=torch.float32), eos_id=0, slots=64, seed=0)
        self.requests = [Request((s + 1, s + 2), key=s, sampling=Sampling(max_tokens=4)) for s in range(6)]

    def __call__(self) -> float:
        """Seconds of processor time that it took."""
        began = time.process_time()
        self.model.load_state_dict(self.start)
        self.engine.load(self.model, version=0)
        self.engine.generate(self.requests, step=0)
        optimizer_step(self.model, self.optimizer, [0, 1], self._loss, lr=1e-3, clip_norm=1.0, should_stop=never)
        json.loads(json.dumps([[0.1 * n, str(n)] for n in range(300)]))
        return time.process_time() - began

    def _loss(self, part: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden_ND = self.model.hidden(self.batch)[:-1]
        return -token_logprobs(hidden_ND, self.model.output_weight, self.batch.ids_N[1:])[0].mean(), {}


class Meter:
    """Wraps the run's records and checkpoints."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        notes.touch()
        self.reference = Reference()
        self.rollouts, self.saving, self.looked, self.referring = 0, 0.0, 0.0, 0.0
        self.began = time.process_time()

    def install(self) -> None:
        record, save = Run.record, RunState.save

        def recorded(run: Run, kind: str, **fields: Any) -> None:
            record(run, kind, **fields)
            if kind == "step" and fields.get("stage") == "rl":
                self.rollout()

        def saved(state: RunState, run: Run) -> Path:
            began = time.process_time()
            path = save(state, run)
            self.saving += time.process_time() - began
            return path

        Run.record, RunState.save = recorded, saved  # type: ignore[method-assign, assignment]

    def rollout(self) -> None:
        self.rollouts += 1
        self.referring += self.reference()
        if self.rollouts % BLOCK:
            return
        note = {
            "at": time.monotonic(),
            "rollout_s": (time.process_time() - self.began - self.saving - self.referring) / BLOCK,
            "reference_s": self.referring / BLOCK,
        }
        if time.monotonic() - self.looked > OBJECTS_S:
            self.looked = time.monotonic()
            note |= {"objects": len(gc.get_objects()), "files": len(os.listdir("/proc/self/fd"))}
        with self.notes.open("a") as file:
            file.write(json.dumps(note) + "\n")
        self.saving, self.referring, self.began = 0.0, 0.0, time.process_time()


def main() -> None:
    torch.set_num_threads(1)
    Meter(Path(sys.argv[1])).install()
    sys.argv = ["upslope", *sys.argv[2:]]
    cli.main()


if __name__ == "__main__":
    main()
