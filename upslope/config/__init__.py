"""The one description of a run: a TOML recipe, read into frozen tables that know every key.

    recipe = load_recipe("recipes/sentiment-ppo.toml", ["rl.lam=0.9", "seed=2"])

A recipe has up to six stages, run in this order: pretrain, sft, reward, preference, rl, expert. `[optim]` holds
defaults for all of them; a stage's own `[stage.optim]` wins. Neither torch nor anything slow is imported here.
"""

from upslope.config.load import describe, find_recipe, load_recipe, read_recipe, shipped_recipes
from upslope.config.presets import PRESETS
from upslope.config.recipe import CLOSING, POLICY_STAGES, STAGES, Recipe, may_change, source_name
from upslope.config.rl import RL, Trust
from upslope.config.tables import (
    Data,
    Evaluation,
    Expert,
    Limits,
    Optim,
    Preference,
    RewardModel,
    Scratch,
    Supervised,
    Task,
)

__all__ = [
    "CLOSING",
    "POLICY_STAGES",
    "PRESETS",
    "RL",
    "STAGES",
    "Data",
    "Evaluation",
    "Expert",
    "Limits",
    "Optim",
    "Preference",
    "Recipe",
    "RewardModel",
    "Scratch",
    "Supervised",
    "Task",
    "Trust",
    "describe",
    "find_recipe",
    "load_recipe",
    "may_change",
    "read_recipe",
    "shipped_recipes",
    "source_name",
]
