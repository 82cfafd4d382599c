"""A process so small that every episode of it can be written down: three tokens, two or three steps, one of them EOS.

The policy is a free table of logits, one row for each prefix that has not ended. `Process` lists all episodes;
`Batch` is every group of n of them, laid out as the library lays out a rollout, each group with its probability. So an
expectation over samples is a sum, and the mean of an estimator is its value, to the last digit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB, EOS = 3, 2


class Process:
    """All episodes of a random process: tokens, rewards at every token, and the policy that picks them."""

    def __init__(self, horizon: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
        live = [p for length in range(horizon) for p in itertools.product(range(EOS), repeat=length)]
        self.horizon = horizon
        self.row = {prefix: i for i, prefix in enumerate(live)}
        self.logits_SV = random(len(live), VOCAB).requires_grad_()
        self.ref_logits_SV = random(len(live), VOCAB)
        self.critic_S = random(len(live)) + 1.0  # a critic that knows nothing
        self.reward_SV = random(len(live), VOCAB)
        choices = itertools.chain.from_iterable(itertools.product(range(VOCAB), repeat=n + 1) for n in range(horizon))
        self.episodes = [
            e for e in choices if EOS not in e[:-1] and (e[-1] == EOS or len(e) == horizon)
        ]  # as short as its first EOS, as long as the horizon

    def probability(self, episode: tuple[int, ...]) -> Tensor:
        """The product of its choices' probabilities, differentiable."""
        p_SV = torch.softmax(self.logits_SV, -1)
        steps = [p_SV[self.row[episode[:t]], token] for t, token in enumerate(episode)]
        return torch.stack(steps).prod()

    def chance(self, episode: tuple[int, ...]) -> float:
        return self.probability(episode).detach().item()

    def rewards(self, episode: tuple[int, ...]) -> list[Tensor]:
        return [self.reward_SV[self.row[episode[:t]], token] for t, token in enumerate(episode)]

    def exact_gradient(self, worth: Callable[[tuple[int, ...]], Any]) -> Tensor:
        """The gradient of sum_e p(e) worth(e), by differentiating the probabilities themselves."""
        total = torch.stack([self.probability(e) * worth(e) for e in self.episodes]).sum()
        (gradient,) = torch.autograd.grad(total, self.logits_SV)
        return gradient

    def return_gradient(self, gamma: float = 1.0) -> Tensor:
        return self.exact_gradient(lambda e: sum(r * gamma**t for t, r in enumerate(self.rewards(e))))

    def exact_critic(self, gamma: float = 1.0) -> Tensor:
        """V(s) of the policy, by going backwards through the tree."""
        p_SV = torch.softmax(self.logits_SV.detach(), -1)
        value_S = torch.zeros(len(self.row), dtype=torch.float64)
        for prefix, i in sorted(self.row.items(), key=lambda item: -len(item[0])):
            for token in range(VOCAB):
                after = self.row.get((*prefix, token))
                worth = self.reward_SV[i, token] + (0.0 if after is None else gamma * value_S[after])
                value_S[i] += p_SV[i, token] * worth
        return value_S


@dataclass(frozen=True)
class Batch:
    """Every ordered group of n episodes, each with its probability, end to end in one ragged batch."""

    process: Process
    starts: Tensor
    state_A: Tensor
    action_A: Tensor
    step_A: Tensor
    group_B: Tensor
    weight_B: Tensor  # the probability of the group that the episode is in, over the group's size

    @classmethod
    def of(cls, process: Process, n: int = 1) -> Batch:
        groups = list(itertools.product(process.episodes, repeat=n))
        chance = {e: process.chance(e) for e in process.episodes}
        episodes = [e for group in groups for e in group]
        weights = [torch.tensor([chance[e] for e in group], dtype=torch.float64).prod() / n for group in groups]
        return cls(
            process=process,
            starts=torch.tensor([0, *(len(e) for e in episodes)]).cumsum(0),
            state_A=torch.tensor([process.row[e[:t]] for e in episodes for t in range(len(e))]),
            action_A=torch.tensor([token for e in episodes for token in e]),
            step_A=torch.tensor([float(t) for e in episodes for t in range(len(e))], dtype=torch.float64),
            group_B=torch.arange(len(groups)).repeat_interleave(n),
            weight_B=torch.stack(weights).repeat_interleave(n),
        )

    @property
    def lengths(self) -> Tensor:
        return self.starts[1:] - self.starts[:-1]

    @property
    def reward_A(self) -> Tensor:
        return self.process.reward_SV[self.state_A, self.action_A]

    @property
    def logp_A(self) -> Tensor:
        return torch.log_softmax(self.process.logits_SV, -1)[self.state_A, self.action_A]

    @property
    def ref_logp_A(self) -> Tensor:
        return torch.log_softmax(self.process.ref_logits_SV, -1)[self.state_A, self.action_A]

    def spread(self, x_B: Tensor) -> Tensor:
        """What belongs to an episode, at each of its tokens."""
        return x_B.repeat_interleave(self.lengths)

    def totals(self, x_A: Tensor) -> Tensor:
        """The sum of each episode's tokens."""
        index_A = self.spread(torch.arange(len(self.lengths)))
        return torch.zeros(len(self.lengths), dtype=x_A.dtype).index_add(0, index_A, x_A)

    def mean_step(self, loss_A: Tensor, weight_A: Tensor | float = 1.0) -> Tensor:
        """The mean, over what can be sampled, of the step that the loss asks for: minus the gradient of its sum."""
        total = (self.spread(self.weight_B) * weight_A * loss_A).sum()
        (gradient,) = torch.autograd.grad(-total, self.process.logits_SV)
        return gradient


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
