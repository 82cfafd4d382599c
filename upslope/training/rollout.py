"""Episodes prepared for training: log-probabilities, values, the distance to the reference, rewards and advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from upslope.algo import token_logprobs
from upslope.config import RL
from upslope.models.heads import ActorCritic, Cut, TokenScores
from upslope.models.trunk import Trunk
from upslope.ragged import Ragged, send
from upslope.training.algorithms import Credit, Signal, credit
from upslope.training.episode import Episode, action_starts, episode_parts, lay_out
from upslope.training.update import never, stop_if


@dataclass
class Batch:
    """Prepared episodes: flat tensors over A action tokens, in fp32 on the CPU, and the offsets of each episode.

    behaviour_logp_A: of the sampler; old_logp_A: the trainer's own, of the weights that sampled; both detached.
    ref_logp_A is old_logp_A where there is no reference. Where rl.scores_once, old_logp_A and entropy_A are nan until
    the one step that uses the batch has filled them.
    """

    episodes: list[Episode]
    starts: Tensor
    behaviour_logp_A: Tensor
    old_logp_A: Tensor
    entropy_A: Tensor
    value_A: Tensor
    ref_logp_A: Tensor
    advantage_A: Tensor
    return_A: Tensor

    def rows(self, members: Sequence[int]) -> Tensor:
        """The places over A of some episodes' actions, in the order of `members`."""
        parts = [torch.arange(int(self.starts[e]), int(self.starts[e + 1])) for e in members]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def select(self, members: Sequence[int]) -> Batch:
        """The batch of some of its episodes."""
        rows, episodes = self.rows(members), [self.episodes[e] for e in members]
        kept = {name: getattr(self, name)[rows] for name in FIELDS}
        return Batch(episodes, action_starts(episodes), **kept)


FIELDS = ("behaviour_logp_A", "old_logp_A", "entropy_A", "value_A", "ref_logp_A", "advantage_A", "return_A")


@dataclass(frozen=True)
class Frozen:
    """The models of a stage that do not learn: where the KL is measured from, and what a sampler's cut is read from."""

    reference: Trunk | None = None
    mask: Trunk | None = None

    def scored_once(self, rl: RL) -> bool:
        """Whether the one step on a rollout is what scores it: rl.scores_once, and nothing to compare with."""
        return rl.scores_once and self.reference is None and self.mask is None

    def cut(self, rl: RL) -> Cut | None:
        return None if self.mask is None else Cut(self.mask, rl.top_k, rl.top_p)


@torch.no_grad()
def prepare(
    episodes: list[Episode],
    model: ActorCritic,
    frozen: Frozen,
    rl: RL,
    kl_coefficient: float,
    *,
    running: float = 0.0,
    score_scale: float = 1.0,
    should_stop: Callable[[], bool] = never,
) -> tuple[Batch, Credit]:
    """Log-probabilities, values and KL of whole episodes, then rewards per token and advantages: the batch and credit.

        r_t = -kl (log p_old(a_t) - log p_ref(a_t)) + what a reward gave for a_t + [t is the last action] the rest

    The KL is there where rl.kl_in says reward. What is paid at the end is paid to an episode that a limit cut too,
    unless rl.limit is "bootstrap": then the critic's value of the state after its last action stands in for it. Never
    both: with gamma 1 their sum has no fixed point. With baseline = best only the chosen episodes stay in the batch.
    Raises StopAsked.
    """
    starts = action_starts(episodes)
    actions = int(starts[-1])
    old, entropy, value, ref = (torch.zeros(actions) for _ in range(4))
    bootstrap_B = torch.zeros(len(episodes))
    behaviour = torch.tensor([p for e in episodes for p in e.logp])
    batch = Batch(episodes, starts, behaviour, old, entropy, value, ref, old, old)
    if frozen.scored_once(rl):
        for waiting in (old, entropy, ref):
            waiting.fill_(float("nan"))
    else:
        _score(batch, model, frozen, rl, bootstrap_B, should_stop)
    in_reward = kl_coefficient if frozen.reference is not None and rl.kl_in == "reward" else 0.0
    groups = torch.tensor([e.group for e in episodes], dtype=torch.int64)
    reward_A = token_rewards(batch, rl, in_reward, score_scale)
    found = credit(rl, Signal(reward_A, value, starts, bootstrap_B, groups, running))
    batch.advantage_A, batch.return_A = found.advantage_A, found.return_A
    if rl.baseline == "best":
        batch = batch.select([e for e in range(len(episodes)) if bool((batch.advantage_A[batch.rows([e])] != 0).any())])
    return batch, found


def _score(
    batch: Batch, model: ActorCritic, frozen: Frozen, rl: RL, bootstrap_B: Tensor, should_stop: Callable[[], bool]
) -> None:
    """Fill in what the models say of the actions, and of what follows a cut. Raises StopAsked."""
    scored = Scored()
    after: list[tuple[list[int], Tensor]] = []
    for part in episode_parts(batch.episodes, 2 * rl.optim.micro_tokens):
        stop_if(should_stop)
        members = [batch.episodes[i] for i in part]
        ragged, action_A = lay_out(members, model.policy.needs_source)
        ragged = ragged.to(model.policy.device)
        scores = model.evaluate(ragged, action_A, temperature=rl.temperature, cut=frozen.cut(rl))
        reference = None if frozen.reference is None else _reference(frozen.reference, ragged, action_A, rl)
        scored.add(batch.rows(part), scores, reference)
        cut = [i for i, e in enumerate(members) if not e.terminal] if rl.limit == "bootstrap" else []
        if cut:
            last = torch.tensor([int(action_A[int(action_starts(members)[i + 1]) - 1]) for i in cut])
            after.append(([part[i] for i in cut], model.value_after(ragged, last).float()))
    rows, old, entropy, more = scored.together()
    batch.old_logp_A[rows], batch.entropy_A[rows] = old, entropy
    if "value" in more:
        batch.value_A[rows] = more["value"]
    batch.ref_logp_A[rows] = more.get("reference", old)
    for places, value_B in after:
        bootstrap_B[torch.tensor(places)] = value_B.cpu()


class Scored:
    """What micro-batches said of their actions, left where it was computed until all have been asked.

    To fetch it each time would make a GPU wait between one micro-batch and the next.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.found: dict[str, list[Tensor]] = {}

    def add(self, rows: Tensor, scores: TokenScores, reference: Tensor | None = None) -> None:
        """rows: the places of the actions over A; reference: what another model said of them."""
        self.rows.append(rows)
        named = {"logp": scores.logp_A, "entropy": scores.entropy_A, "value": scores.value_A, "reference": reference}
        for name, x_A in named.items():
            if x_A is not None:
                self.found.setdefault(name, []).append(x_A.detach().float())

    def together(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """All rows, their log-probabilities, entropies, and what else there is by name: on the CPU, in fp32."""
        if not self.rows:
            empty = torch.zeros(0)
            return empty.long(), empty, empty, {}
        all_of = {name: torch.cat(parts).cpu() for name, parts in self.found.items()}
        return torch.cat(self.rows), all_of.pop("logp"), all_of.pop("entropy"), all_of


def _reference(reference: Trunk, ragged: Ragged, action_A: Tensor, rl: RL) -> Tensor:
    state_A, target_A = (
        send(ragged.previous[action_A], reference.device),
        ragged.ids_N[send(action_A, reference.device)],
    )
    logp_A, _ = token_logprobs(
        reference.hidden(ragged)[state_A], reference.output_weight, target_A, temperature=rl.temperature
    )
    return logp_A.float()


def token_rewards(batch: Batch, rl: RL, kl_coefficient: float, score_scale: float = 1.0) -> Tensor:
    """reward_A: the KL penalty at every action, what a reward gave for single actions, the rest at the last one."""
    reward_A = torch.zeros_like(batch.old_logp_A)
    if kl_coefficient:
        reward_A -= kl_coefficient * (batch.old_logp_A - batch.ref_logp_A)
    for e, episode in enumerate(batch.episodes):
        assert episode.total is not None
        first, last = int(batch.starts[e]), int(batch.starts[e + 1]) - 1
        rest = episode.total
        for action, score in episode.steps:
            reward_A[first + action] += score / score_scale
            rest -= score
        if episode.terminal or rl.limit == "score":
            reward_A[last] += rest / score_scale
    return reward_A


def rollout_metrics(episodes: Sequence[Episode], batch: Batch, samples: int) -> dict[str, float]:
    """What a rollout was like; each mean is over what its name says: episodes that were scored, or action tokens.

    The token means are over the batch that is learned from; reward/equal_groups is the share of prompts whose scored
    samples all got the same total, among those with several of them.
    """
    scored = [e for e in episodes if e.total is not None]
    totals = np.array([e.total for e in scored])
    metrics = {
        "reward/mean": float(totals.mean()),
        "reward/std": float(totals.std()),
        "reward/failed": (len(episodes) - len(scored)) / len(episodes),
        "length/mean": sum(len(e.actions) for e in scored) / len(scored),
        "length/truncated": sum(not e.terminal for e in scored) / len(scored),
        "tokens/sampled": float(sum(len(e.actions) for e in episodes)),
        "episodes/learned": float(len(batch.episodes)),
    }
    for name in scored[0].rewards:
        metrics[f"reward/{name}"] = float(np.mean([e.rewards[name] for e in scored]))
    if samples > 1:
        groups: dict[int, list[float | None]] = {}
        for e in scored:
            groups.setdefault(e.group, []).append(e.total)
        several = [group for group in groups.values() if len(group) > 1]
        if several:
            metrics["reward/equal_groups"] = sum(len(set(group)) == 1 for group in several) / len(several)
    return metrics


def policy_metrics(batch: Batch) -> dict[str, float]:
    """The policy's entropy where it acted, and how far the sampler's log-probabilities are from the trainer's: over the
    tokens learned from. Nothing for an empty batch."""
    if not batch.episodes:
        return {}
    gap_A = (batch.behaviour_logp_A - batch.old_logp_A).abs()
    return {
        "policy/entropy": float(batch.entropy_A.mean()),
        "policy/sampler_gap_mean": float(gap_A.mean()),
        "policy/sampler_gap_max": float(gap_A.max()),
    }


def reference_metrics(batch: Batch) -> dict[str, float]:
    """The distance to the reference, by the k1 estimator; means over the episodes and tokens learned from."""
    kl_A = batch.old_logp_A - batch.ref_logp_A
    if not batch.episodes:
        return {}
    return {
        "kl/reference_per_completion": float(kl_A.sum()) / len(batch.episodes),
        "kl/reference_per_token": float(kl_A.mean()),
    }
