"""Frozen models that score completions: the likelihood under a language model, the likeness to a reference.

They live in the trainer's process, are loaded once and never learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from upslope.errors import ModelError
from upslope.models.trunk import Trunk
from upslope.rewards.reference import references
from upslope.rewards.types import RewardOutput
from upslope.text.examples import Example
from upslope.text.tokenizer import Tokenizer
from upslope.training.batches import micro_batches
from upslope.training.encoder import INSTALL, SentenceEncoder, encoder_folder
from upslope.training.episode import Episode
from upslope.training.supervised import example_logprobs
from upslope.training.update import stop_if


class LikelihoodSource:
    """Fluency: the mean log-probability of a completion's tokens, given its prompt, under a frozen language model.

        score = 1/T sum_t log p(token_t | prompt, tokens before),   nats a token

    Text is cut into tokens anew by that model's own tokenizer; its EOS counts as a token where the policy ended by
    itself. The model must never be the policy: paid for its own likelihood it would learn to be certain, for every
    sharper distribution has a higher one, whatever it says.
    """

    def __init__(
        self, name: str, model: Trunk, tokenizer: Tokenizer, micro_tokens: int, should_stop: Callable[[], bool]
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.micro_tokens = micro_tokens
        self.should_stop = should_stop

    @torch.no_grad()
    def __call__(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> RewardOutput:
        output = RewardOutput(np.full(len(episodes), np.nan), [None] * len(episodes))
        examples = [self._example(episode, e) for e, episode in enumerate(episodes)]
        context = self.model.config.context
        for example in examples:
            if not any(example.trained[1:]):
                output.failure_B[example.row] = "the completion has no token to judge"
            elif len(example.ids) > context:
                output.failure_B[example.row] = f"{len(example.ids)} tokens exceed the context of {context}"
        examples = [example for example in examples if output.failure_B[example.row] is None]
        for part in micro_batches([len(e.ids) for e in examples], self.micro_tokens):
            stop_if(self.should_stop)
            members = [examples[i] for i in part]
            logp_A = example_logprobs(self.model, members).double().cpu().numpy()
            ends = accumulate(sum(e.trained[1:]) for e in members)
            for example, logp in zip(members, np.split(logp_A, list(ends)[:-1]), strict=True):
                output.score_B[example.row] = logp.mean()
        return output

    def close(self) -> None:
        """Nothing to end: the model lives in this process."""

    def _example(self, episode: Episode, row: int) -> Example:
        first = self.tokenizer.encode_prompt(episode.prompt)
        second = self.tokenizer.encode(episode.completion, special=False)
        second = [*second, self.tokenizer.eos_id] if episode.terminal else second
        return Example([*first, *second], [False] * len(first) + [True] * len(second), row)


class SimilaritySource:
    """Meaning: the cosine of the sentence embeddings of a completion and its reference; of several, the nearest.

    Raises ModelError where no encoder is installed.
    """

    def __init__(self, name: str, encoder: Callable[[Sequence[str]], torch.Tensor] | None = None) -> None:
        folder = encoder_folder()
        if encoder is None and folder is None:
            raise ModelError(f"{name} needs a sentence encoder and none is here", INSTALL)
        self.name = name
        self.encoder = encoder or SentenceEncoder(folder)  # type: ignore[arg-type]

    def __call__(self, episodes: Sequence[Episode], rows: Sequence[dict[str, Any]]) -> RewardOutput:
        texts = [references(row) for row in rows]
        vector = self.encoder([e.completion for e in episodes])
        flat = self.encoder([text for group in texts for text in group])
        ends = list(accumulate(map(len, texts)))
        scores = [
            float((flat[end - len(group) : end] @ vector[e]).max())
            for e, (end, group) in enumerate(zip(ends, texts, strict=True))
        ]
        return RewardOutput(np.array(scores), [None] * len(scores))

    def close(self) -> None:
        """Nothing to end: the encoder lives in this process."""
