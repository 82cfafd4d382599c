"""Generation: requests in, completions with their log-probabilities out."""

from upslope.engine.engine import Engine
from upslope.engine.types import Completion, Request, Sampling

__all__ = ["Completion", "Engine", "Request", "Sampling"]
