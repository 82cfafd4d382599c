"""Episodes: the record of what a policy did. Tokens are the record; text is a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from upslope.ragged import Ragged
from upslope.training.batches import micro_batches


@dataclass
class Episode:
    """One prompt and what the policy made of it.

    ids: all tokens, the prompt first; actions: the places in ids that the policy chose (what others said may stand
    between them); logp: their log-probabilities under the distribution they were sampled from; finish: eos, stop or
    length (cut by a limit); version: of the weights that sampled; group: episodes of one prompt share it; rewards:
    the scores by name; steps: (number of an action, weighted score) where a reward paid single actions; total: the
    weighted sum of all, None with the reason in `failure` where a reward failed; used: False where its group was set
    aside because all its totals are equal.
    """

    prompt: str
    completion: str
    ids: list[int]
    actions: list[int]
    logp: list[float]
    finish: str
    version: int
    group: int
    sample: int
    rewards: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[int, float]] = field(default_factory=list)
    total: float | None = None
    failure: str | None = None
    used: bool = True

    @property
    def terminal(self) -> bool:
        """The policy ended it itself; otherwise it is truncated."""
        return self.finish != "length"

    @property
    def prompt_length(self) -> int:
        return self.actions[0] if self.actions else len(self.ids)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def episode_parts(episodes: Sequence[Episode], budget: int) -> list[list[int]]:
    """Which of the episodes are computed at once: parts of at most `budget` tokens, a common prompt counted once."""
    groups, prompts = [e.group for e in episodes], [e.prompt_length for e in episodes]
    return micro_batches([len(e.ids) for e in episodes], budget, groups, prompts)


def lay_out(episodes: Sequence[Episode], needs_source: bool = False) -> tuple[Ragged, Tensor]:
    """The ragged batch of some episodes and the places of their actions in it, episode by episode.

    Where several of them share a prompt it becomes their common parent and is computed once; for a model kind that
    needs_source every prompt is a parent.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for e, episode in enumerate(episodes):
        sharing.setdefault((episode.group, *episode.ids[: episode.prompt_length]), []).append(e)
    sequences: list[list[int]] = []
    parents: list[int] = []
    place = [(0, 0)] * len(episodes)  # episode -> (its sequence, tokens of it that stand in the parent)
    for members in sharing.values():
        parent = -1
        shared = episodes[members[0]].prompt_length if needs_source or len(members) > 1 else 0
        if shared:
            parent = len(sequences)
            sequences.append(episodes[members[0]].ids[:shared])
            parents.append(-1)
        for e in members:
            place[e] = (len(sequences), shared)
            sequences.append(episodes[e].ids[shared:])
            parents.append(parent)
    batch = Ragged.of(sequences, parents)
    places = [
        batch.starts[sequence] + action - shared
        for episode, (sequence, shared) in zip(episodes, place, strict=True)
        for action in episode.actions
    ]
    return batch, torch.tensor(places, dtype=torch.int64)


def action_starts(episodes: Sequence[Episode]) -> Tensor:
    """Offsets of each episode in a flat tensor over A action tokens: B + 1 of them."""
    counts = torch.tensor([0, *(len(e.actions) for e in episodes)], dtype=torch.int64)
    return counts.cumsum(0)
