"""Two tasks that every algorithm must learn, from random weights, through the real loop and the real engine.

bandit: one token, one of which pays 1, another 0.5, the others nothing.
rule:   the prompt is one of four symbols; the two that follow it in the round pay 1, all else pays 0. A policy that
        knows nothing is paid 4 times in a hundred.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from upslope.config import Scratch, load_recipe
from upslope.engine import Engine
from upslope.models.heads import ActorCritic
from upslope.models.open import make_runner, new_model
from upslope.models.trunk import Trunk
from upslope.observe.events import read_events
from upslope.ragged import Ragged
from upslope.rewards.types import RewardOutput
from upslope.text.prepare import Prompt
from upslope.training.rl import Actors, run_rl
from upslope.training.rollout import Frozen
from upslope.training.run import Run
from upslope.training.scoring import Scorer

EOS, SYMBOLS = 0, (1, 2, 3, 4)
RATE = 4e-3  # learning rate of a rollout's only optimizer step
MAX_KL = 0.05  # nats a token, beyond which a rollout is used no further; the trust region has its own, harder bound
KINDS = {
    "decoder": Scratch(width=32, layers=2, heads=4, kv_heads=2, ffn_width=64, context=16, tied=False),
    "lstm": Scratch(kind="lstm", width=32, layers=1, context=16, tied=False),
    "encdec": Scratch(kind="encdec", width=32, layers=1, heads=4, ffn_width=64, context=16, tied=False),
}

# algorithm or variant -> what its recipe says beyond the algorithm's row
VARIANTS = {
    "ppo": {"algorithm": "ppo"},
    "ppo, dual clip": {"algorithm": "ppo", "dual_clip": 3.0, "clip_high": 0.28, "value_loss": "huber"},
    "ppo, KL target in the reward": {"algorithm": "ppo", "kl": 0.2, "kl_target": 1.5, "kl_horizon": 2000},
    "ppo, exact KL in the loss": {"algorithm": "ppo", "kl": 0.02, "kl_in": "loss", "kl_estimator": "exact"},
    "ppo-kl": {"algorithm": "ppo-kl"},
    "trpo": {"algorithm": "trpo"},
    "a2c": {"algorithm": "a2c"},
    "reinforce": {"algorithm": "reinforce"},
    "reinforce, no baseline": {"algorithm": "reinforce", "baseline": "none"},
    "reinforce, running baseline": {"algorithm": "reinforce", "baseline": "running"},
    "reinforce, learned baseline": {"algorithm": "reinforce", "baseline": "critic"},
    "reinforce++": {"algorithm": "reinforce++"},
    "rloo": {"algorithm": "rloo"},
    "grpo": {"algorithm": "grpo"},
    "dr-grpo": {"algorithm": "dr-grpo"},
    "dapo": {"algorithm": "dapo", "overlong": 0.0},  # answers of two tokens in a limit of two leave no soft margin
    "gspo": {"algorithm": "gspo"},
    "cispo": {"algorithm": "cispo"},
    "nlpo": {"algorithm": "nlpo"},
    "raft": {"algorithm": "raft"},
    "gkd": {"algorithm": "gkd"},
}


@dataclass(frozen=True)
class Task:
    """Prompts, what a completion earns, its right answers (for a teacher), and when the task counts as learned."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    enough: float

    def score(self, prompt: list[int], answer: list[int]) -> float:
        if self.name == "bandit":
            return {3: 1.0, 1: 0.5}.get(answer[0], 0.0)
        return float(answer == self.answer(prompt))

    def answer(self, prompt: list[int]) -> list[int]:
        if self.name == "bandit":
            return [3]
        return [prompt[-1] % 4 + 1, (prompt[-1] + 1) % 4 + 1]


TASKS = {
    "bandit": Task("bandit", ((2,),), 1, 0.9),
    "rule": Task("rule", tuple((s,) for s in SYMBOLS), 2, 0.8),
}


class Symbols:
    """The tokenizer of the tasks: a letter for each token."""

    eos_id, vocab_size, fingerprint = EOS, 5, "symbols"

    def decode(self, ids: list[int]) -> str:
        return "".join("_abcd"[i] for i in ids)

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.decode([i]) for i in ids]

    def save(self, folder: Path) -> None:
        (folder / "symbols.txt").write_text("_abcd")


class Paid:
    """The task's reward, in this process."""

    name = "task"

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, episodes, rows) -> RewardOutput:
        scores = [self.task.score(e.ids[: e.prompt_length], e.ids[e.prompt_length :]) for e in episodes]
        return RewardOutput(np.array(scores), [None] * len(scores))

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class Outcome:
    """Of one run: mean reward of the last three rollouts, KL to the start a completion, the largest KL that one
    rollout's update moved (where the algorithm bounds it), and seconds."""

    reward: float
    kl: float
    moved: float
    seconds: float
    rollouts: int


def teacher(task: Task, kind: str) -> Trunk:
    """A model that knows the answers, by likelihood."""
    model = new_model(KINDS[kind], 5, 99)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = Ragged.of([[*p, *task.answer(list(p))] for p in task.prompts])
    learned = torch.nonzero(batch.previous >= 0).squeeze(1)
    for _ in range(60):
        logits = model.hidden(batch)[batch.previous[learned]] @ model.output_weight.t()
        loss = torch.nn.functional.cross_entropy(logits, batch.ids_N[learned])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def recipe_of(variant: str, task: Task, seed: int, steps: int):
    """A small recipe: 128 episodes a rollout, whatever the algorithm."""
    keys = VARIANTS[variant]
    grouped = keys["algorithm"] in ("rloo", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "raft")
    own = {"teacher": "made"} if keys["algorithm"] == "gkd" else {"reward": "made:here"}
    size = {"prompts": 16, "samples": 8} if grouped else {"prompts": 128, "samples": 1}
    base = {"steps": steps, "max_tokens": task.max_tokens, "kl": 0.01} | size
    if keys["algorithm"] in ("dr-grpo", "dapo", "gspo", "cispo", "raft", "gkd"):
        del base["kl"]
    table = {
        "name": "learning",
        "model": "made",
        "dtype": "fp32",
        "seed": seed,
        "checkpoint_minutes": 1e6,
        "data": {"rows": "made", "prompt": "p"},
        "limits": {"slots": 128},
        "rl": base | own | keys,
    }
    rl = load_recipe(table).rl
    assert rl is not None
    several = rl.epochs * rl.minibatches  # optimizer steps a rollout: the more, the smaller
    changes = [f"rl.optim.lr={RATE / several}", "rl.optim.eps=1e-5"]
    if several > 1 and rl.update == "gradient":
        changes.append(f"rl.trust.max_kl={MAX_KL}")
    return load_recipe(table, changes)


def learn(variant: str, task: Task, seed: int, steps: int, kind: str = "decoder") -> Outcome:
    """One run from random weights."""
    shape = KINDS[kind]
    recipe = recipe_of(variant, task, seed, steps)
    rl = recipe.rl
    assert rl is not None
    start = time.perf_counter()
    policy = new_model(shape, 5, seed)
    trunk = new_model(shape, 5, seed + 1) if rl.critic == "separate" else None
    frozen = new_model(shape, 5, seed).requires_grad_(False)
    reference = teacher(task, kind) if rl.teacher else frozen
    mask = new_model(shape, 5, seed).requires_grad_(False) if rl.mask_every else None
    symbols = Symbols()
    engine = Engine(
        make_runner(policy, dtype=torch.float32),
        eos_id=EOS,
        slots=recipe.limits.slots,
        seed=seed,
        mask_runner=make_runner(policy, dtype=torch.float32) if rl.mask_every > 1 else None,
    )
    prompts = [Prompt(list(p), symbols.decode(list(p)), {}) for p in task.prompts]
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        run = Run(recipe, Path(folder), plain=True)
        try:
            model = ActorCritic(policy, rl.critic, trunk)
            scorer = Scorer([Paid(task)], [1.0], 0.0)
            run_rl(run, rl, Actors(model, Frozen(reference, mask), engine, scorer, symbols), prompts)
        finally:
            run.close()
        metrics = [e["metrics"] for e in read_events(Path(folder) / "events.jsonl") if e["kind"] == "step"]
    last = metrics[-3:]
    moved = [m.get("trust/kl", m.get("policy/last_approx_kl", 0.0)) for m in metrics]
    return Outcome(
        reward=sum(m["reward/task"] for m in last) / len(last),
        kl=sum(m.get("kl/reference_per_completion", 0.0) for m in last) / len(last),
        moved=max(moved),
        seconds=time.perf_counter() - start,
        rollouts=len(metrics),
    )


def learned(variant: str, task: Task, outcome: Outcome) -> bool:
    """Paid as well as the task asks; less where a tight KL target stands against it."""
    return outcome.reward >= (0.6 if "target" in variant else task.enough)


def held(variant: str, outcome: Outcome) -> bool:
    """The trust region's bound exactly; a KL target within a third; no update past ten times where it should end.

    A bound that only ends a rollout's use is read before each optimizer step: the last step may pass it.
    """
    if variant == "trpo":
        return outcome.moved <= 0.01
    if "target" in variant and outcome.kl > 2.0:
        return False
    return outcome.moved <= 10 * MAX_KL
