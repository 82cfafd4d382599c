"""Collect episodes (generate, score) and prepare them for training (log-probabilities, values, KL, advantages)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from upslope.algo import token_logprobs
from upslope.config import RL
from upslope.engine import Engine, Request, Sampling
from upslope.models.decoder import Decoder
from upslope.models.heads import ActorCritic
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.algorithms import Algorithm
from upslope.training.batches import micro_batches
from upslope.training.episode import Episode, action_starts, lay_out
from upslope.training.run import Run
from upslope.training.scoring import Scorer


@dataclass
class Batch:
    """Prepared episodes: flat tensors over A action tokens, in fp32 on the CPU, and the offsets of each episode.

    behaviour_logp_A: of the sampler; old_logp_A: the trainer's own, of the weights that sampled; both detached.
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
        return torch.cat([torch.arange(int(self.starts[e]), int(self.starts[e + 1])) for e in members])


def sampling_of(rl: RL) -> Sampling:
    return Sampling(max_tokens=rl.max_tokens, temperature=rl.temperature, stop=rl.stop)


def generate(
    run: Run,
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    keys: Sequence[int],
    sampling: Sampling,
    *,
    samples: int,
    step: int,
) -> list[Episode]:
    """Sample completions; `keys` number the prompts, so that the tokens do not depend on the batch or the slots."""
    requests = [
        Request(prompt_ids=tuple(p.ids), key=k, samples=samples, sampling=sampling)
        for p, k in zip(prompts, keys, strict=True)
    ]
    episodes = []
    for c in engine.generate(requests, step=step, should_stop=run.should_stop):
        prompt = prompts[c.request]
        first = len(prompt.ids)
        episodes.append(
            Episode(
                prompt=prompt.text,
                completion=tokenizer.decode(c.ids),
                ids=[*prompt.ids, *c.ids],
                actions=list(range(first, first + len(c.ids))),
                logp=list(c.logp),
                finish=c.finish,
                version=c.version,
                group=keys[c.request],
                sample=c.sample,
            )
        )
    return episodes


def collect(
    run: Run,
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    keys: Sequence[int],
    scorer: Scorer,
    rl: RL,
    step: int,
) -> list[Episode]:
    """One rollout: generate, score; episodes whose reward failed carry the reason and no total."""
    episodes = generate(run, engine, tokenizer, prompts, keys, sampling_of(rl), samples=rl.samples, step=step)
    rows = [prompts[i].row for i in range(len(prompts)) for _ in range(rl.samples)]
    scorer.score(episodes, rows)
    return episodes


@torch.no_grad()
def prepare(
    episodes: list[Episode],
    model: ActorCritic,
    reference: Decoder | None,
    algorithm: Algorithm,
    rl: RL,
    kl_coefficient: float,
) -> Batch:
    """Log-probabilities, values and KL of whole episodes, then rewards per token and advantages.

        r_t = -kl (log p_old(a_t) - log p_ref(a_t)) + [t is the last action] score

    The score of an episode that a limit cut is paid too, unless rl.limit is "bootstrap": then the critic's value of
    the state after its last action stands in for it. Never both: with gamma 1 their sum has no fixed point.
    """
    starts = action_starts(episodes)
    actions = int(starts[-1])
    old, entropy, value, ref = (torch.zeros(actions) for _ in range(4))
    bootstrap_B = torch.zeros(len(episodes))
    lengths = [len(e.ids) for e in episodes]
    groups = [e.group for e in episodes]
    batch = Batch(
        episodes, starts, torch.tensor([p for e in episodes for p in e.logp]), old, entropy, value, ref, old, old
    )
    for part in micro_batches(lengths, 2 * rl.optim.micro_tokens, groups):
        members = [episodes[i] for i in part]
        ragged, action_A = lay_out(members)
        ragged = ragged.to(model.policy.device)
        rows = batch.rows(part)
        scores = model.evaluate(ragged, action_A, temperature=rl.temperature)
        old[rows] = scores.logp_A.float().cpu()
        entropy[rows] = scores.entropy_A.float().cpu()
        if scores.value_A is not None:
            value[rows] = scores.value_A.float().cpu()
        if rl.limit == "bootstrap":
            cut = [i for i, e in enumerate(members) if not e.terminal]
            if cut:
                last = torch.tensor([int(action_A[int(action_starts(members)[i + 1]) - 1]) for i in cut])
                bootstrap_B[torch.tensor([part[i] for i in cut])] = model.value_after(ragged, last).float().cpu()
        if reference is not None:
            hidden_ND = reference.hidden(ragged)
            state_A = ragged.previous[action_A]
            ref_logp_A, _ = token_logprobs(
                hidden_ND[state_A], reference.output_weight, ragged.ids_N[action_A], temperature=rl.temperature
            )
            ref[rows] = ref_logp_A.float().cpu()
    reward_A = token_rewards(batch, rl, kl_coefficient if reference is not None else 0.0)
    batch.advantage_A, batch.return_A = algorithm.advantages(rl, reward_A, value, starts, bootstrap_B)
    return batch


def token_rewards(batch: Batch, rl: RL, kl_coefficient: float) -> Tensor:
    """reward_A: the KL penalty at every action, the score at each episode's last one."""
    reward_A = torch.zeros_like(batch.old_logp_A)
    if kl_coefficient:
        reward_A -= kl_coefficient * (batch.old_logp_A - batch.ref_logp_A)
    for e, episode in enumerate(batch.episodes):
        assert episode.total is not None
        if episode.terminal or rl.limit == "score":
            reward_A[int(batch.starts[e + 1]) - 1] += episode.total
    return reward_A


def rollout_metrics(episodes: Sequence[Episode], batch: Batch) -> dict[str, float]:
    """What a rollout was like; each mean is over what its name says: episodes, or action tokens."""
    kept = batch.episodes
    kl_A = batch.old_logp_A - batch.ref_logp_A
    gap_A = (batch.behaviour_logp_A - batch.old_logp_A).abs()
    totals = np.array([e.total for e in kept])
    metrics = {
        "reward/mean": float(totals.mean()),
        "reward/std": float(totals.std()),
        "reward/failed": (len(episodes) - len(kept)) / len(episodes),
        "kl/reference_per_completion": float(kl_A.sum()) / len(kept),
        "kl/reference_per_token": float(kl_A.mean()),
        "policy/entropy": float(batch.entropy_A.mean()),
        "policy/sampler_gap_mean": float(gap_A.mean()),
        "policy/sampler_gap_max": float(gap_A.max()),
        "length/mean": len(batch.old_logp_A) / len(kept),
        "length/truncated": sum(not e.terminal for e in kept) / len(kept),
    }
    for name in kept[0].rewards:
        metrics[f"reward/{name}"] = float(np.mean([e.rewards[name] for e in kept]))
    return metrics
