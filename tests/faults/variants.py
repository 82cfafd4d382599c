"""The runs that are struck: small recipes that hold, between them, every algorithm, critic and stage.

A new algorithm or stage joins by a line here; test_resume.py says when one is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import make_recipe

REWARD = """
import os

def score(prompts, completions, rows):
    if os.path.exists(os.environ.get("UPSLOPE_TEST_UNWELL", "")):
        raise RuntimeError("unwell")
    return [float(sum(c in "aeiou" for c in text)) for text in completions]

def rare(prompts, completions, rows):
    return [float(n >= 3) for n in score(prompts, completions, rows)]
"""

# Three stages, with a reward model: name -> what it changes in [rl] of tests.conftest.make_recipe, or dtype
LONG: Mapping[str, dict[str, Any]] = {
    "ppo-shared": {"critic": "shared"},
    "ppo-detached": {"critic": "detached", "kl_target": 1.0, "samples": 2, "minibatches": 4},
    "ppo-separate": {"critic": "separate", "limit": "bootstrap", "entropy_weight": 0.01},
    "ppo-bf16": {"dtype": "bf16", "importance": "truncate"},
    "grpo": {"algorithm": "grpo", "samples": 3, "epochs": 1, "minibatches": 1},
    "trpo": {"algorithm": "trpo", "epochs": 1, "minibatches": 1},
    # long and fast enough that the copy which the last rollout is cut by is neither the start nor the policy
    "nlpo": {"algorithm": "nlpo", "mask_every": 2, "steps": 4, "optim": {"lr": 0.03}},
}
# Only rl, by a function's reward: name of an algorithm -> what it changes in its row; `reward` names one of REWARD
ALGORITHMS: Mapping[str, dict[str, Any]] = {
    "ppo-kl": {"minibatches": 2},
    "a2c": {"critic": "separate", "reward_norm": "running"},
    "reinforce": {"baseline": "running"},
    "reinforce++": {"minibatches": 2},
    "rloo": {"samples": 3},
    "dr-grpo": {"samples": 3},
    "dapo": {"samples": 2, "minibatches": 2, "reward": "rare"},  # equal groups, so that prompts are drawn anew
    "gspo": {"samples": 3, "minibatches": 2},
    "cispo": {"samples": 3, "minibatches": 2},
    "raft": {"samples": 3},
    "gkd": {"teacher": "teacher"},
}
# One stage by itself: name -> the stage and its table
STAGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {"steps": 3, "batch": 4}),
    "dpo": ("preference", {"loss": "dpo", "steps": 3, "batch": 4, "sft_weight": 0.1}),
    "kto": ("preference", {"loss": "kto", "steps": 3, "batch": 4}),
    "ipo": ("preference", {"loss": "ipo", "steps": 3, "batch": 4}),
    "simpo": ("preference", {"loss": "simpo", "steps": 3, "batch": 4}),
    "orpo": ("preference", {"loss": "orpo", "steps": 3, "batch": 4}),
    "expert": ("expert", {"steps": 3, "batch": 4, "prompts": 8, "samples": 3, "max_tokens": 8}),
}
# One stage and rl by a function's reward, from scratch: name -> the table [model]
SHAPE = {"width": 16, "layers": 2, "context": 64, "vocab": 300}
SCRATCH: Mapping[str, dict[str, Any]] = {
    "scratch-decoder": SHAPE | {"kind": "decoder", "heads": 4},
    "scratch-lstm": SHAPE | {"kind": "lstm"},
    "scratch-encdec": SHAPE | {"kind": "encdec", "heads": 4},
}
VARIANTS = (*LONG, *ALGORITHMS, *STAGES, *SCRATCH)


def recipe_of(variant: str, model: Path, work: Path) -> dict[str, Any]:
    """The recipe of a variant; work holds rows.jsonl, reward.py and the folder teacher."""
    recipe = make_recipe(model)
    recipe["data"]["rows"] = str(work / "rows.jsonl")
    recipe["optim"]["micro_tokens"] = 64  # several computations in each loop
    recipe["eval"]["judges"] = []
    score = f"{work}/reward.py:score"
    if variant in LONG:
        changes = dict(LONG[variant])
        recipe["dtype"] = changes.pop("dtype", recipe["dtype"])
        recipe["rl"] |= {"reward": {"stage:reward": 1.0, score: 0.1}, "steps": 2, **changes}
        return recipe
    if variant in SCRATCH:
        del recipe["reward"]
        recipe["model"] = SCRATCH[variant]
        recipe["rl"] |= {"reward": score, "steps": 2, "critic": "separate", "value_loss": "huber"}
        return recipe
    del recipe["sft"], recipe["reward"], recipe["rl"]
    if variant in STAGES:
        stage, table = STAGES[variant]
        recipe[stage] = table | ({"reward": score} if stage == "expert" else {})
        return recipe
    changes = ALGORITHMS[variant]
    small = {"algorithm": variant, "steps": 2, "prompts": 4, "max_tokens": 8}
    own = {key: value for key, value in changes.items() if key not in ("reward", "teacher")}
    source = (
        {"teacher": str(work / changes["teacher"])}
        if "teacher" in changes
        else {"reward": f"{work}/reward.py:{changes.get('reward', 'score')}"}
    )
    recipe["rl"] = small | own | source
    return recipe
