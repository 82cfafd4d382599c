"""What learns from preference pairs: a reward model by its scores, a policy by the log-probabilities of both sides.

The loop in preference.py knows a learner by `compare` and nothing of which loss it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from upslope.algo import (
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
    token_logprobs,
)
from upslope.config import Preference
from upslope.config import RewardModel as RewardConfig
from upslope.models.heads import RewardModel
from upslope.models.trunk import Trunk
from upslope.ragged import Ragged, send
from upslope.text.examples import Pair
from upslope.text.tokenizer import Tokenizer
from upslope.training.batches import lay_out_texts, micro_batches
from upslope.training.export import export_policy, export_reward_model
from upslope.training.run import Run
from upslope.training.update import Stats, stop_if

Sides = tuple[Tensor, Tensor]  # chosen_B, rejected_B
PairConfig = RewardConfig | Preference


def lay_out_pairs(pairs: Sequence[Pair], needs_source: bool = False) -> tuple[Ragged, list[int]]:
    """The ragged batch of some pairs, and which of its sequences are the chosen sides, then the rejected ones.

    A pair's prompt is the parent of its two sides and computed once; a pair without one is two whole texts. For a
    model kind that needs_source the first token of each is its parent.
    """
    cuts = [p.prompt_length or int(needs_source) for p in pairs]
    sources: list[list[int]] = []
    parents: dict[str, list[int]] = {"chosen": [], "rejected": []}
    for pair, cut in zip(pairs, cuts, strict=True):
        for side, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if cut and (side == "chosen" or ids[:cut] != sources[-1]):
                sources.append(ids[:cut])
            parents[side].append(len(sources) - 1 if cut else -1)
    rows = [p.chosen[cut:] for p, cut in zip(pairs, cuts, strict=True)]
    rows += [p.rejected[cut:] for p, cut in zip(pairs, cuts, strict=True)]
    batch = Ragged.of([*sources, *rows], [*[-1] * len(sources), *parents["chosen"], *parents["rejected"]])
    return batch, list(range(len(sources), len(batch)))


def pair_tokens(pair: Pair) -> int:
    """Tokens that a pair costs."""
    return len(pair.chosen) + len(pair.rejected) - pair.prompt_length


def learned_tokens(pairs: Sequence[Pair]) -> Sides:
    """How many tokens of each side have a log-probability: the completion's, or all but the first of a whole text."""
    first = torch.tensor([max(p.prompt_length, 1) for p in pairs])
    return torch.tensor([len(p.chosen) for p in pairs]) - first, torch.tensor([len(p.rejected) for p in pairs]) - first


def pair_logprobs(model: Trunk, pairs: Sequence[Pair]) -> Sides:
    """The log-probability of each side's learned tokens, summed."""
    batch, sides = lay_out_pairs(pairs, model.needs_source)
    counts = torch.cat(learned_tokens(pairs)).tolist()
    ends = [batch.starts[s + 1] for s in sides]
    target_A = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    state_A, target_ids_A = send(batch.previous[target_A], model.device), send(batch.ids_N[target_A], model.device)
    hidden_AD = model.hidden(batch.to(model.device))[state_A]
    logp_A, _ = token_logprobs(hidden_AD, model.output_weight, target_ids_A)
    chosen_B, rejected_B = torch.stack([part.sum() for part in logp_A.split(counts)]).split(len(pairs))
    return chosen_B, rejected_B


@dataclass(frozen=True)
class PairBatch:
    """Some pairs and, where a loss reads them, the reference's log-probabilities of both sides and kto's z0."""

    pairs: Sequence[Pair]
    reference: Sides | None = None
    z0: Tensor | None = None

    def part(self, members: Sequence[int]) -> PairBatch:
        """Some of them: z0 stays that of the whole optimizer batch."""
        chosen = None if self.reference is None else (self.reference[0][members], self.reference[1][members])
        return PairBatch([self.pairs[i] for i in members], chosen, self.z0)


@dataclass(frozen=True)
class Compared:
    """A batch of pairs as a loss sees it: log-probabilities, summed or per token, of the policy and the reference."""

    policy: Sides
    reference: Sides
    z0: Tensor
    margin_B: Tensor


@dataclass(frozen=True)
class Objective:
    """One row of the table of losses; beta is the published default."""

    loss: Callable[[Preference, float, Compared], tuple[Tensor, Stats]]
    beta: float
    reference: bool  # compares with the model that the stage starts from
    per_token: bool  # log-probabilities divided by the tokens of their side
    mismatched: bool = False  # reads z0 from mismatched pairs
    sft_weight: float = 0.0  # of the chosen side's likelihood, by definition


def _dpo(cfg: Preference, beta: float, x: Compared) -> tuple[Tensor, Stats]:
    smoothing = cfg.label_smoothing
    return dpo_loss(*x.policy, *x.reference, beta=beta, label_smoothing=smoothing, margin_B=x.margin_B)


def _ipo(cfg: Preference, beta: float, x: Compared) -> tuple[Tensor, Stats]:
    return ipo_loss(*x.policy, *x.reference, beta=beta)


def _simpo(cfg: Preference, beta: float, x: Compared) -> tuple[Tensor, Stats]:
    if cfg.margin is None:
        return simpo_loss(*x.policy, beta=beta)
    return simpo_loss(*x.policy, beta=beta, margin=cfg.margin)


def _orpo(cfg: Preference, beta: float, x: Compared) -> tuple[Tensor, Stats]:
    return orpo_loss(*x.policy, beta=beta)


def _kto(cfg: Preference, beta: float, x: Compared) -> tuple[Tensor, Stats]:
    """Each pair is one desirable and one undesirable example; its loss is their mean, its margin that of rewards."""
    pairs = len(x.margin_B)
    desirable_2B = torch.arange(2 * pairs, device=x.margin_B.device) < pairs
    loss_2B, stats = kto_loss(torch.cat(x.policy), torch.cat(x.reference), desirable_2B, x.z0, beta=beta)
    _, pair_stats = bradley_terry_loss(stats["reward_B"][:pairs], stats["reward_B"][pairs:])
    return 0.5 * (loss_2B[:pairs] + loss_2B[pairs:]), pair_stats


OBJECTIVES: Mapping[str, Objective] = {
    "dpo": Objective(_dpo, beta=0.1, reference=True, per_token=False),
    "ipo": Objective(_ipo, beta=0.1, reference=True, per_token=True),
    "kto": Objective(_kto, beta=0.1, reference=True, per_token=False, mismatched=True),
    "simpo": Objective(_simpo, beta=2.0, reference=False, per_token=True),
    "orpo": Objective(_orpo, beta=0.1, reference=False, per_token=True, sft_weight=1.0),
}


class Learner(Protocol):
    """A model that learns from pairs.

    reference, mismatched: what its loss reads besides the pairs, as in Objective; sft_weight: of the likelihood of
    the chosen side, beside the loss.
    """

    stage: str
    trunk: Trunk
    reference: bool
    mismatched: bool
    sft_weight: float

    @property
    def model(self) -> nn.Module: ...

    def compare(self, batch: PairBatch) -> tuple[Tensor, Stats, Tensor | None]:
        """loss_B, statistics per pair, and the chosen sides' log-probabilities, summed, where there are any."""
        ...

    def calibrate(self, train: Sequence[Pair], micro_tokens: int, should_stop: Callable[[], bool]) -> None:
        """The last touch, when all steps are done. Raises StopAsked, with nothing changed."""
        ...

    def export(self, run: Run, tokenizer: Tokenizer) -> None:
        """Write STAGE/model."""
        ...


class RewardLearner:
    """A reward model: Bradley-Terry on the scores of whole texts.

    When it is fitted, its scores are shifted and scaled to mean 0 and standard deviation 1 over training texts: a
    constant of the model from then on, so that one KL coefficient means the same for any reward model.
    """

    def __init__(self, model: RewardModel) -> None:
        self.stage = "reward"
        self.model = model
        self.trunk = model.trunk
        self.reference = self.mismatched = False
        self.sft_weight = 0.0

    def compare(self, batch: PairBatch) -> tuple[Tensor, Stats, Tensor | None]:
        texts, sides = lay_out_pairs(batch.pairs, self.trunk.needs_source)
        chosen_B, rejected_B = self.model.score(texts.to(self.trunk.device))[sides].split(len(batch.pairs))
        loss_B, stats = bradley_terry_loss(chosen_B, rejected_B, margin_B=_margins(batch.pairs, chosen_B))
        return loss_B, stats, None

    def calibrate(self, train: Sequence[Pair], micro_tokens: int, should_stop: Callable[[], bool]) -> None:
        texts = [ids for p in train for ids in (p.chosen, p.rejected)]
        prompts = [p.prompt_length for p in train for _ in range(2)]
        score_B = score_texts(self.model, texts, prompts, micro_tokens, should_stop)
        self.model.set_scale(mean=float(score_B.mean()), std=float(score_B.std()))

    def export(self, run: Run, tokenizer: Tokenizer) -> None:
        export_reward_model(run, self.stage, self.model, tokenizer)


class PolicyLearner:
    """A policy by itself: DPO and its kin on log-probabilities of completions (of whole texts without a prompt)."""

    def __init__(self, model: Trunk, cfg: Preference) -> None:
        self.stage = "preference"
        self.model = self.trunk = model
        self.cfg = cfg
        self.objective = OBJECTIVES[cfg.loss]
        self.reference, self.mismatched = self.objective.reference, self.objective.mismatched
        self.beta = cfg.beta or self.objective.beta
        self.sft_weight = self.objective.sft_weight or cfg.sft_weight

    def compare(self, batch: PairBatch) -> tuple[Tensor, Stats, Tensor | None]:
        chosen_B, rejected_B = own = pair_logprobs(self.model, batch.pairs)
        like = chosen_B.detach()
        zeros = (torch.zeros_like(like), torch.zeros_like(like))
        reference = tuple(send(x.to(like.dtype), like.device) for x in batch.reference) if batch.reference else zeros
        if self.objective.per_token:
            counts = [send(n.to(like.dtype), like.device) for n in learned_tokens(batch.pairs)]
            own = (chosen_B / counts[0], rejected_B / counts[1])
            reference = (reference[0] / counts[0], reference[1] / counts[1])
        z0 = like.new_zeros(()) if batch.z0 is None else batch.z0.to(like)
        compared = Compared(own, (reference[0], reference[1]), z0, _margins(batch.pairs, like))
        loss_B, stats = self.objective.loss(self.cfg, self.beta, compared)
        return loss_B, stats, chosen_B

    def calibrate(self, train: Sequence[Pair], micro_tokens: int, should_stop: Callable[[], bool]) -> None:
        """Nothing to set: a policy has no scale."""

    def export(self, run: Run, tokenizer: Tokenizer) -> None:
        export_policy(run, self.stage, self.model, tokenizer)


@torch.no_grad()
def score_texts(
    model: RewardModel,
    texts: Sequence[Sequence[int]],
    prompts: Sequence[int],
    micro_tokens: int,
    should_stop: Callable[[], bool],
) -> np.ndarray:
    """The score of each text, in the order given; prompts: how many of its tokens are a prompt. Raises StopAsked."""
    scores = np.zeros(len(texts), dtype=np.float64)
    for part in micro_batches([len(t) for t in texts], 2 * micro_tokens):
        stop_if(should_stop)
        batch, _ = lay_out_texts([texts[i] for i in part], [prompts[i] for i in part], model.trunk.needs_source)
        score_B = model.score(batch.to(model.trunk.device))[-len(part) :]
        scores[part] = score_B.double().cpu().numpy()
    return scores


def _margins(pairs: Sequence[Pair], like: Tensor) -> Tensor:
    return send(torch.tensor([p.margin for p in pairs], dtype=like.dtype), like.device)
