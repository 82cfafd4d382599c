"""What is asked of the engine and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from upslope.errors import RecipeError

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled. temperature 0 takes the most probable token; top_k 0 and top_p 1 keep all.

    stop: texts that end a completion as soon as it contains them. Raises RecipeError for values that cannot be.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1),
            ("temperature", self.temperature, self.temperature >= 0),
            ("top_k", self.top_k, self.top_k >= 0),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
        ):
            if not fits:
                raise RecipeError(
                    f"sampling: {name} = {value}", "max_tokens >= 1, temperature and top_k >= 0, 0 < top_p <= 1"
                )
        if "" in self.stop:
            raise RecipeError("sampling: an empty stop text ends everything", "remove it")


@dataclass(frozen=True)
class Request:
    """Some samples of one prompt; `key` numbers the prompt for its random numbers, whatever the batch."""

    prompt_ids: tuple[int, ...]
    key: int
    sampling: Sampling
    samples: int = 1


@dataclass
class Completion:
    """One sample: ids (EOS included when it was chosen), log-probabilities under the very distribution sampled."""

    request: int
    sample: int
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: Finish = "length"
    version: int = 0

    @property
    def terminal(self) -> bool:
        """The policy ended it; otherwise a limit did."""
        return self.finish != "length"
