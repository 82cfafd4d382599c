"""Back to supervision: the best of several samples of a policy become what a model is fitted to (the stage expert).

    sample G completions of each prompt -> score them -> keep the best -> maximum likelihood on what is kept

Expert iteration (Anthony et al. 2017, arXiv 1705.08439) without the search, as in RAFT (Dong et al. 2023, arXiv
2304.06767). What was sampled is written to expert/samples.jsonl before anything is fitted: a run stopped before that
samples again, with the same random numbers, and one stopped after it reads the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from upslope.checkpoint import atomic_write_text, load_checkpoint
from upslope.config import Expert, Supervised
from upslope.engine import Engine, Sampling
from upslope.errors import DataError, Interrupted
from upslope.evaluate import Estimate, interval
from upslope.models.trunk import Trunk
from upslope.observe.events import read_events
from upslope.text.cleaning import Account
from upslope.text.examples import Example
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.collect import generate
from upslope.training.episode import Episode
from upslope.training.run import Run
from upslope.training.scoring import Scorer
from upslope.training.supervised import run_supervised
from upslope.training.update import StopAsked
from upslope.training.work import Meter, episode_tokens, work

STAGE = "expert"
SAMPLES_STEP = 2**30  # a rollout number of its own: these random numbers are no training rollout's
HELD_OUT_SHARE = 8  # one held-out prompt for so many to learn from, to watch the fit by


def draw_samples(
    run: Run,
    cfg: Expert,
    engine: Engine,
    tokenizer: Tokenizer,
    scorer: Scorer,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
) -> list[Episode]:
    """Sample and score completions of both sides' prompts, mark the best, write expert/samples.jsonl.

    `used` marks what is kept. min_score is a condition of what is learned from, not of what the fit is watched by.
    Raises Interrupted when a stop is asked for, with nothing written.
    """
    prompts = [*train, *held_out]
    sampling = Sampling(max_tokens=cfg.max_tokens, temperature=cfg.temperature, stop=cfg.stop)
    run.progress(STAGE, 0.0, cfg.steps, "generate")
    try:
        keys = list(range(len(prompts)))
        episodes = generate(run, engine, tokenizer, prompts, keys, sampling, samples=cfg.samples, step=SAMPLES_STEP)
        run.progress(STAGE, 0.0, cfg.steps, "score")
        scorer.score(episodes, [p.row for p in prompts for _ in range(cfg.samples)])
        scorer.check(episodes)
    except (StopAsked, Interrupted):
        raise Interrupted(
            f"stopped in {STAGE} before its samples were written", "the same command samples them again"
        ) from None
    mark_best(episodes[: len(train) * cfg.samples], cfg.keep, cfg.min_score)
    mark_best(episodes[len(train) * cfg.samples :], cfg.keep, None)
    lines = [json.dumps({"kind": "sample", **episode.record()}) for episode in episodes]
    atomic_write_text(_path(run), "\n".join(lines) + "\n")
    return episodes


def read_samples(run: Run, count: int) -> list[Episode] | None:
    """What `draw_samples` wrote, if it is there and whole."""
    if not _path(run).is_file():
        return None
    events = read_events(_path(run))
    fields = [{name: value for name, value in event.items() if name != "kind"} for event in events]
    return [Episode(**f) for f in fields] if len(fields) == count else None


def mark_best(episodes: Sequence[Episode], keep: int, min_score: float | None) -> None:
    """Set `used` for the `keep` highest totals of each group, equal ones by sample number, and for no other.

    One whose reward failed, or that is below min_score, is never kept.
    """
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        episode.used = False
        if episode.total is not None:
            groups.setdefault(episode.group, []).append(episode)
    for group in groups.values():
        for episode in sorted(group, key=lambda e: (-(e.total or 0.0), e.sample))[:keep]:
            episode.used = min_score is None or (episode.total or 0.0) >= min_score


def best_of(scores: Sequence[float], n: int) -> float:
    """The expected maximum of n draws, from N >= n scores, without bias.

        E[max of n] = sum_k x_(k) C(k - 1, n - 1) / C(N, n),   x_(1) <= ... <= x_(N)

    which is the mean of the maximum over all subsets of n. Raises ValueError for fewer scores than n.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"the best of {n} from {len(scores)} scores")
    ways = math.comb(len(scores), n)
    return sum(x * (math.comb(k, n - 1) / ways) for k, x in enumerate(sorted(scores)))


def run_expert(
    run: Run,
    cfg: Expert,
    model: Trunk,
    tokenizer: Tokenizer,
    episodes: Sequence[Episode],
    prompts: int,
    at_end: Callable[[int], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Fit a model to what is kept of the samples, the first `prompts` prompts' to learn from, the others' to watch.

    Records what choosing gains, writes expert/model. Raises DataError where nothing is kept.
    """
    train = [e for e in episodes if e.group < prompts]
    held_out = [e for e in episodes if e.group >= prompts]
    examples = examples_of(run, cfg, train, "train")
    watched = examples_of(run, cfg, held_out, "held-out")
    if load_checkpoint(run.stage_folder(STAGE) / "checkpoints") is None:  # else the log has it already
        record_best_of(run, cfg, train, sampling_work(model, episodes))
    shared = ("steps", "batch", "freeze_layers", "optim", "eval_every", "best_by", "patience")
    fit = Supervised(**{key: getattr(cfg, key) for key in shared})
    return run_supervised(run, STAGE, fit, model, tokenizer, examples, watched, at_end)


def examples_of(run: Run, cfg: Expert, episodes: Sequence[Episode], side: str) -> list[Example]:
    """Prompt and completion of each kept sample; its actions are learned, so an EOS only where the policy chose one."""
    account = Account(len(episodes), unit="samples")
    least = cfg.min_score if cfg.min_score is not None and side == "train" else -math.inf
    for i, episode in enumerate(episodes):
        if episode.total is None:
            account.drop("whose reward failed", i)
        elif episode.total < least:
            account.drop(f"below {least:g}", i)
        elif not episode.used:
            account.drop(f"not among the best {cfg.keep} of a prompt", i)
    kept = [e for e in episodes if e.used]
    if not kept:
        best = max((f"{e.total:g}" for e in episodes if e.total is not None), key=float, default="none: all failed")
        raise DataError(
            f"none of {len(episodes)} {side} samples was kept; the best score was {best}",
            "lower expert.min_score, or mend the reward",
        )
    cut = sum(not e.terminal for e in kept)
    account.extra = f"; {cut} of the kept cut by max_tokens, learned without an end" if cut else ""
    run.account(f"{side} samples: {account.close(len(kept))}", STAGE)
    places = [set(e.actions) for e in kept]
    return [Example(e.ids, [n in own for n in range(len(e.ids))], e.group) for e, own in zip(kept, places, strict=True)]


def sampling_work(model: Trunk, episodes: Sequence[Episode]) -> dict[str, float]:
    """Tokens and operations of the samples; the model that drew them has the shape of the one that is fitted."""
    tokens = episode_tokens(episodes)
    return work(tokens, Meter.of(model).forward(tokens))


def record_best_of(run: Run, cfg: Expert, episodes: Sequence[Episode], metrics: Mapping[str, float]) -> None:
    """The table of what choosing gains: the expected best of n samples for n = 1, 2, 4 and so on, and what was kept.

    metrics: what else is recorded of the samples.

    A prompt with fewer than n scores (others failed) has no part in the row of n.
    """
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        if episode.total is not None:
            groups.setdefault(episode.group, []).append(episode)
    scores = [[e.total for e in group if e.total is not None] for group in groups.values()]
    kept = [[e.total for e in group if e.total is not None and e.used] for group in groups.values()]
    powers = [2**k for k in range(cfg.samples.bit_length())]
    table = {
        "one sample" if n == 1 else f"best of {n}": [best_of(s, n) for s in scores if len(s) >= n]
        for n in sorted({*powers, cfg.samples})
    }
    table["kept"] = [float(np.mean(s)) for s in kept if s]
    rows, found = [], dict(metrics)
    for name, values in table.items():
        if values:
            mean, low, high = interval(np.array(values), seed=run.recipe.seed)
            rows.append([name, Estimate(mean, low, high).text(3), str(len(values))])
            found[f"expert/{name.replace(' ', '_')}"] = mean
    run.record("eval", stage=STAGE, step=0, metrics=found)
    note = f"{cfg.samples} samples of each prompt; mean over prompts [95 % bootstrap interval over prompts]"
    columns = ["", "score", "prompts"]
    run.record("table", stage=STAGE, title="expert: what choosing gains", columns=columns, rows=rows, note=note)


def _path(run: Run) -> Path:
    return run.stage_folder(STAGE) / "samples.jsonl"
