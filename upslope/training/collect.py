"""Episodes: sample, score, and sample anew where a group of equal scores would teach nothing."""

from __future__ import annotations

from collections.abc import Sequence

from upslope.config import RL
from upslope.engine import Engine, Request, Sampling
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.batches import items_from
from upslope.training.episode import Episode
from upslope.training.run import Run
from upslope.training.scoring import Scorer


def sampling_of(rl: RL) -> Sampling:
    return Sampling(max_tokens=rl.max_tokens, temperature=rl.temperature, top_k=rl.top_k, top_p=rl.top_p, stop=rl.stop)


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
    scorer: Scorer,
    rl: RL,
    *,
    rollout: int,
    used: int,
) -> tuple[list[Episode], int]:
    """One rollout's episodes, and how many prompts have been used when it is made; `used` were before it.

    Episodes whose reward failed carry the reason and no total; more of them than limits.max_failures allows raise
    RewardError. Where groups are compared, an episode left alone by failures is not used. With rl.resample, groups
    whose totals are all equal are marked as not used and as many new prompts are drawn, for so many rounds (DAPO's
    dynamic sampling, arXiv 2503.14476, with a bound): what is still missing then makes the rollout smaller.
    """
    episodes: list[Episode] = []
    wanted = rl.prompts
    for _ in range(rl.resample + 1):
        chosen = [prompts[i] for i in items_from(len(prompts), used, wanted, run.recipe.seed, "prompts")]
        keys = list(range(used, used + wanted))
        sampled = generate(run, engine, tokenizer, chosen, keys, sampling_of(rl), samples=rl.samples, step=rollout)
        used += wanted
        scorer.score(sampled, [p.row for p in chosen for _ in range(rl.samples)])
        charge_overlong(sampled, rl)
        episodes += sampled
        wanted = set_equal_groups_aside(sampled) if rl.resample else 0
        if not wanted:
            break
    scorer.check(episodes)
    if rl.compares_groups:
        set_lonely_aside(episodes)
    return episodes, used


def set_lonely_aside(episodes: Sequence[Episode]) -> None:
    """Mark episodes as not used whose group has no other that was scored: there is nothing to compare them with."""
    scored: dict[int, int] = {}
    for episode in episodes:
        scored[episode.group] = scored.get(episode.group, 0) + (episode.total is not None)
    for episode in episodes:
        if scored[episode.group] < 2:
            episode.used = False


def charge_overlong(episodes: Sequence[Episode], rl: RL) -> None:
    """Take a price from the total of an episode that comes near the limit; 1 for one that the limit cut.

        price = max(0, length - (max_tokens - buffer)) / buffer,   buffer = overlong max_tokens

    Yu et al. 2025, eq. 13 (arXiv 2503.14476).
    """
    buffer = rl.overlong * rl.max_tokens
    if not buffer:
        return
    for episode in episodes:
        price = max(0.0, len(episode.actions) - (rl.max_tokens - buffer)) / buffer
        episode.rewards["overlong"] = -price
        if episode.total is not None:
            episode.total -= price


def set_equal_groups_aside(episodes: Sequence[Episode]) -> int:
    """Mark the groups whose totals are all equal (or all failed) as not used; how many they are."""
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    aside = [g for g in groups.values() if len({e.total for e in g if e.total is not None}) < 2]
    for group in aside:
        for episode in group:
            episode.used = False
    return len(aside)
