"""Scores of episodes: learned reward models on token ids, functions of the user's on texts, weighted and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from upslope.errors import RewardError
from upslope.models.heads import RewardModel
from upslope.rewards.functions import FunctionReward
from upslope.rewards.types import RewardOutput
from upslope.training.episode import Episode
from upslope.training.pairs import score_texts

FP32_MAX = float(np.finfo(np.float32).max)


class Source(Protocol):
    """One named reward over episodes."""

    name: str

    def __call__(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> RewardOutput: ...

    def close(self) -> None: ...


class LearnedSource:
    """A reward model's score of the episode's tokens, EOS included.

    The model has only seen whole texts, so that a completion cut by a limit is scored with an EOS behind it.
    """

    def __init__(
        self, name: str, model: RewardModel, eos_id: int, micro_tokens: int, should_stop: Callable[[], bool]
    ) -> None:
        self.name = name
        self.model = model
        self.eos_id = eos_id
        self.micro_tokens = micro_tokens
        self.should_stop = should_stop

    def __call__(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> RewardOutput:
        texts = [e.ids if e.ids[-1] == self.eos_id else [*e.ids, self.eos_id] for e in episodes]
        prompts = [e.prompt_length for e in episodes]
        score_B = score_texts(self.model, texts, prompts, self.micro_tokens, self.should_stop)
        return RewardOutput(score_B, [None] * len(texts))

    def close(self) -> None:
        """Nothing to end: the model lives in this process."""


class FunctionSource:
    """A function of (prompts, completions, rows), run in a worker process with limits of time and memory."""

    def __init__(
        self,
        source: str | Callable[..., Any],
        name: str,
        *,
        timeout_s: float,
        memory_gb: float,
        should_stop: Callable[[], bool],
    ) -> None:
        self.name = name
        self.function = FunctionReward(
            source, name=name, timeout_s=timeout_s, memory_gb=memory_gb, should_stop=should_stop
        )

    def __call__(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> RewardOutput:
        return self.function([e.prompt for e in episodes], [e.completion for e in episodes], list(rows))

    def close(self) -> None:
        self.function.close()


class Scorer:
    """A weighted sum of sources: a failure of any is the failure of the episode, never a 0.

    pieces: the text that each of some token ids adds, by which a reward's steps find their actions.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        max_failures: float,
        pieces: Callable[[list[int]], list[str]] | None = None,
    ) -> None:
        self.sources = list(sources)
        self.weights = list(weights)
        self.max_failures = max_failures
        self.pieces = pieces

    def score(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> None:
        """Fill in each episode's rewards, steps, total and failure; `check` judges how many failed."""
        for episode in episodes:
            episode.total = 0.0
        for source, weight in zip(self.sources, self.weights, strict=True):
            output = source(episodes, rows)
            for i, (episode, score, failure) in enumerate(zip(episodes, output.score_B, output.failure_B, strict=True)):
                if failure is not None or not np.isfinite(score):
                    episode.failure = f"{source.name}: {failure or f'score {score}'}"
                    episode.total = None
                    continue
                episode.rewards[source.name] = float(score)
                if episode.total is not None:
                    episode.total += weight * float(score)
                    episode.steps += self._placed(episode, output.step_B.get(i, []), weight)
        for episode in episodes:
            if episode.total is not None and not _fits([episode.total, *(score for _, score in episode.steps)]):
                episode.failure, episode.total = f"a weighted score of {episode.total} or its steps: beyond fp32", None

    def check(self, episodes: Sequence[Episode]) -> None:
        """Raise RewardError where more than the allowed share of scored episodes failed, or all of them."""
        failed = [e for e in episodes if e.failure]
        if len(failed) > self.max_failures * len(episodes) or len(failed) == len(episodes):
            raise RewardError(
                f"{len(failed)} of {len(episodes)} rewards failed, the first with {failed[0].failure}",
                f"mend the reward, or allow more with limits.max_failures (now {self.max_failures:g})",
            )

    def _placed(self, episode: Episode, steps: Sequence[tuple[int, float]], weight: float) -> list[tuple[int, float]]:
        """(action, weighted score): the action whose text reaches a step's end, the last one where none does."""
        if not steps or self.pieces is None:
            return []
        reached = np.cumsum([len(piece) for piece in self.pieces([episode.ids[a] for a in episode.actions])])
        last = len(episode.actions) - 1
        return [(min(int(np.searchsorted(reached, end)), last), weight * score) for end, score in steps]

    def close(self) -> None:
        for source in self.sources:
            source.close()


def _fits(numbers: Sequence[float]) -> bool:
    """Whether numbers stay numbers in fp32, in which everything behind a reward is computed."""
    return all(abs(number) <= FP32_MAX for number in numbers)
