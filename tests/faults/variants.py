"""The runs that are struck: small recipes that hold, between them, every algorithm, critic, stage and model kind.

VARIANTS are whole runs; PAIRS are every algorithm on every kind of model but the decoder, which VARIANTS have, in the
smallest form. A new algorithm, stage or kind joins by a line here; test_resume.py says when one is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import OPTConfig

from tests.conftest import make_recipe
from tests.models.kinds import FALLBACK, fallback
from upslope.config import Data, Scratch
from upslope.models.open import save_model
from upslope.text.tokenizer import Tokenizer
from upslope.training.start import write_start

REWARD = """
import os

def score(prompts, completions, rows):
    if os.path.exists(os.environ.get("UPSLOPE_TEST_UNWELL", "")):
        raise RuntimeError("unwell")
    return [float(sum(c in "aeiou" for c in text)) for text in completions]

def rare(prompts, completions, rows):
    return [float(n >= 3) for n in score(prompts, completions, rows)]

def odd(prompts, completions, rows):
    return [float(sum(map(ord, text)) % 2) for text in completions]
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
# sft and rl by a function's reward, from scratch: name -> the table [model]
SHAPE: Mapping[str, Any] = {"width": 16, "layers": 2, "context": 64, "vocab": 300}
SCRATCH: Mapping[str, dict[str, Any]] = {
    "scratch-decoder": {**SHAPE, "kind": "decoder", "heads": 4},
    "scratch-lstm": {**SHAPE, "kind": "lstm"},
    "scratch-encdec": {**SHAPE, "kind": "encdec", "heads": 4},
    "scratch-encoder": {**SHAPE, "kind": "encoder", "heads": 4},
}
# What is measured beside the reward, and other kinds of stages: name -> changes of tables; None removes one
TASK = {"prompt": "Praise {film}\n", "reference": "text", "metrics": ["chrf", "distinct_1"]}
SMALL_RL = {"steps": 2, "prompts": 4, "max_tokens": 8, "minibatches": 2}
SMALL_EXPERT = {"steps": 2, "batch": 4, "prompts": 8, "samples": 2, "max_tokens": 8}
FAST = {"lr": 0.2}  # so that a stage soon learns too much
OTHERS: Mapping[str, dict[str, Any]] = {
    "task": {
        "data": {"group": "film", "valid": 0.2, "test": 0.2, "max_tokens": 60},
        "task": TASK,  # with a function of the user's, in its worker, beside these
        "sft": {"steps": 2, "batch": 4},
        "rl": SMALL_RL,
        "expert": SMALL_EXPERT,
        "eval": {"prompts": 6, "every": 1, "watched": 4, "judges": []},
    },
    "best": {  # the best of a stage is not its last, and some end early
        "sft": {"steps": 6, "batch": 4, "eval_every": 1, "best_by": "valid/loss", "optim": FAST},
        "reward": {"steps": 8, "batch": 4, "eval_every": 1, "best_by": "valid/margin", "patience": 2, "optim": FAST},
        "rl": {**SMALL_RL, "steps": 5, "best_by": "task/reward", "patience": 2, "optim": FAST},
        "expert": SMALL_EXPERT | {"steps": 6, "eval_every": 2, "best_by": "valid/loss", "patience": 1, "optim": FAST},
        "eval": {"prompts": 6, "every": 1, "watched": 8, "judges": []},
    },
    "judges": {"rl": SMALL_RL, "eval": {"prompts": 6, "judges": ["vader", "language:en"]}},  # and models, and functions
    "fallback": {
        "model": "fallback",
        "sft": {"steps": 3, "batch": 4},
        "rl": {**SMALL_RL, "critic": "shared"},
    },
    "encoder-masked": {
        "model": SCRATCH["scratch-encoder"],
        "pretrain": {"steps": 3, "batch": 4},
        "sft": {"steps": 3, "batch": 4},
        "data": {"text": "text", "classes": "label", "group": "film", "valid": 0.2, "test": 0.2, "max_tokens": 60},
    },
}
VARIANTS = (*LONG, *ALGORITHMS, *STAGES, *SCRATCH, *OTHERS)
KINDS = ("lstm", "encdec", "encoder", "fallback")  # beside the decoder
PAIRS = {f"{kind}-{name}": (kind, name) for kind in KINDS for name in ("ppo", "grpo", "trpo", "nlpo", *ALGORITHMS)}
SMALLEST: Mapping[str, dict[str, Any]] = {
    "ppo": {"critic": "separate", "minibatches": 2},
    "grpo": {"samples": 3, "epochs": 1, "minibatches": 1},
    "trpo": {"epochs": 1, "minibatches": 1},
    "nlpo": {"mask_every": 2, "minibatches": 2},
    **ALGORITHMS,
}

SMALL_PAIR = {"steps": 2, "max_tokens": 5}


def write_models(work: Path, model: Path, rows: list[dict[str, str]]) -> None:
    """What runs start from and learn from: a folder of each kind, and NAME-teacher, with other weights."""
    data = Data(rows="given", text="text")
    for suffix, seed in (("", 5), ("-teacher", 6)):
        for kind in KINDS[:-1]:
            shape = Scratch.model_validate(SCRATCH[f"scratch-{kind}"])
            write_start(work / f"{kind}{suffix}", shape, seed, Dataset.from_list(rows), data)
        tokenizer = Tokenizer.load(model)
        config = OPTConfig.from_dict(FALLBACK["fallback-opt"].to_dict() | {"vocab_size": tokenizer.vocab_size})
        save_model(fallback(config, seed), work / f"fallback{suffix}")
        tokenizer.save(work / f"fallback{suffix}")


def recipe_of(variant: str, model: Path, work: Path) -> dict[str, Any]:
    """The recipe of a variant or pair; work holds rows.jsonl, reward.py, and the folders of `write_models`."""
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
        return _choosing(recipe) if recipe["model"]["kind"] == "encoder" else recipe
    del recipe["sft"], recipe["reward"], recipe["rl"]
    if variant in OTHERS:
        return _other(variant, recipe, work)
    if variant in STAGES:
        stage, table = STAGES[variant]
        recipe[stage] = table | ({"reward": score} if stage == "expert" else {})
        return recipe
    if variant in PAIRS:
        kind, algorithm = PAIRS[variant]
        recipe["model"] = str(work / kind)
        recipe["eval"] |= {"prompts": 2, "show": 0}
        recipe["rl"] = _rl_of(algorithm, work, f"{kind}-teacher") | SMALL_PAIR
        if kind == "encoder" and "reward" in recipe["rl"]:
            recipe["rl"]["reward"] = score  # no label is rare
        return _choosing(recipe) if kind == "encoder" else recipe
    recipe["rl"] = _rl_of(variant, work, "teacher")
    return recipe


def _rl_of(algorithm: str, work: Path, teacher: str) -> dict[str, Any]:
    changes = SMALLEST[algorithm]
    own = {key: value for key, value in changes.items() if key not in ("reward", "teacher")}
    source = (
        {"teacher": str(work / teacher)}
        if "teacher" in changes
        else {"reward": f"{work}/reward.py:{changes.get('reward', 'score')}"}
    )
    return {"algorithm": algorithm, "steps": 2, "prompts": 4, "max_tokens": 8} | own | source


def _choosing(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same for a policy of one action, a label."""
    data = recipe["data"]
    for key in ("prompt_words", "label", "prefer"):
        del data[key]
    data["classes"] = "label"
    recipe["rl"]["max_tokens"] = 1
    return recipe


def _other(variant: str, recipe: dict[str, Any], work: Path) -> dict[str, Any]:
    """A row of OTHERS on top of a recipe without stages."""
    score, odd = f"{work}/reward.py:score", f"{work}/reward.py:odd"
    recipe |= {key: dict(value) if isinstance(value, dict) else value for key, value in OTHERS[variant].items()}
    recipe["data"]["rows"] = str(work / "rows.jsonl")
    for stage in ("rl", "expert"):
        if stage in recipe:
            recipe[stage]["reward"] = score
    if variant == "task":
        recipe["task"] = TASK | {"metrics": [*TASK["metrics"], odd]}
        recipe["rl"]["reward"] = {"chrf": 1.0, score: 0.1}
    if variant == "judges":
        frozen = f"likelihood:{work / 'teacher'}"
        recipe["rl"]["reward"] = {score: 1.0, frozen: 0.5}
        recipe["eval"]["judges"] = [*recipe["eval"]["judges"], frozen, odd]
    if recipe["model"] == "fallback":
        recipe["model"] = str(work / "fallback")
    return recipe
