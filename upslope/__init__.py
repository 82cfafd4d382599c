"""upslope trains language models from theory to practice: supervised learning, rewards, policy gradients, and back.

upslope.train("recipe.toml")                                   a run, from a file or a shipped recipe's name
upslope.train("recipe.toml", reward=my_function, rows=my_rows)  the same with your own objects
upslope.load("runs/sentiment-ppo").generate(["It is a"])        what came of it
upslope.reevaluate("runs/mine", prompts=1000)                  a finished run on more held-out prompts
upslope.sweep("recipe.toml", {"rl.lam": [0.9, 0.95, 1.0]})     many runs, and their comparison
upslope.compare("runs/a", "runs/b")                            any runs in one table and one picture
upslope.UpslopeError                                           what all of them raise, in one line
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upslope.errors import UpslopeError as UpslopeError
from upslope.version import VERSION

if TYPE_CHECKING:
    from upslope.api import LoadedModel as LoadedModel
    from upslope.api import compare as compare
    from upslope.api import load as load
    from upslope.api import reevaluate as reevaluate
    from upslope.api import sweep as sweep
    from upslope.api import train as train

__version__ = VERSION
__all__ = ["LoadedModel", "UpslopeError", "__version__", "compare", "load", "reevaluate", "sweep", "train"]


def __getattr__(name: str) -> Any:
    """Import torch and the loops only when they are asked for, so that the command line starts at once."""
    if name in ("LoadedModel", "compare", "load", "reevaluate", "sweep", "train"):
        from upslope import api

        return getattr(api, name)
    raise AttributeError(f"module 'upslope' has no attribute {name!r}")
