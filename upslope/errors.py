"""Every error that a user can cause, in one tree.

    UpslopeError                 one line: what is wrong and the value seen; what to change
      RecipeError (ValueError)     the recipe, an option, or a combination of them
      DataError (ValueError)       rows, columns, prompts, tokenizers
      ModelError (ValueError)      weights, configurations, architectures
      RewardError (RuntimeError)   a reward that fails, hangs or answers nonsense
      RunError (RuntimeError)      run folders, checkpoints, disks, a run that no longer can be right
      Interrupted                  the run was asked to stop and has saved itself

The command line prints the line and exits with `exit_code`; a traceback appears with --debug only.
"""

from __future__ import annotations


class UpslopeError(Exception):
    """What is wrong with the value seen, and what to change, in one line."""

    exit_code = 2

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)  # both, so that the error survives pickling
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class RecipeError(UpslopeError, ValueError):
    """The recipe, an option, or a combination of options cannot be right."""


class DataError(UpslopeError, ValueError):
    """Rows, columns, prompts or a tokenizer cannot be used."""


class ModelError(UpslopeError, ValueError):
    """Weights, a model configuration or an architecture cannot be used."""


class RewardError(UpslopeError, RuntimeError):
    """A reward function fails, hangs or returns what is not a score."""


class RunError(UpslopeError, RuntimeError):
    """A run folder, checkpoint or disk cannot be used, or the run can no longer be right."""


class Interrupted(UpslopeError):
    """The run was asked to stop; its state is on disk and the same command carries on."""

    exit_code = 130
