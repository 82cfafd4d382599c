"""A recipe from its first stage to its last: what is finished is skipped, what was begun carries on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from upslope.config import Recipe, describe
from upslope.engine import Engine
from upslope.errors import Interrupted, UpslopeError
from upslope.models.heads import ActorCritic, RewardModel
from upslope.models.open import make_runner
from upslope.observe.report import write_report
from upslope.training.closing import evaluate_run
from upslope.training.data import make_prompts, masked_examples, preference_pairs, require_room, supervised_examples
from upslope.training.expert import HELD_OUT_SHARE, draw_samples, read_samples, run_expert
from upslope.training.pairs import Learner, PolicyLearner, RewardLearner
from upslope.training.parts import Given, Pipeline, check_teacher, with_room
from upslope.training.preference import run_pairs
from upslope.training.rehearse import rehearse
from upslope.training.rl import Actors, run_rl
from upslope.training.rollout import Frozen
from upslope.training.run import Run
from upslope.training.start import begin
from upslope.training.supervised import run_supervised

MEAN_TOKENS = 32.0  # a first guess of an example's length, for the time left only


def run_pipeline(recipe: Recipe, folder: Path, *, given: Given | None = None, plain: bool | None = None) -> Path:
    """Run every stage that is not finished yet and the closing evaluation; returns the run folder.

    Raises Interrupted, saved, when asked to stop; the same call carries on.
    """
    given = given or Given()
    run = Run(recipe, folder, plain=plain)
    try:
        with run.stopping_on_signals():
            _run_stages(run, recipe, given)
    except UpslopeError:
        _report_if_possible(run)
        raise
    finally:
        run.close()
    return folder


def _run_stages(run: Run, recipe: Recipe, given: Given) -> None:
    stages = recipe.steps
    if all(run.done(stage) for stage in stages):
        run.terminal.note(
            f"{run.folder}: finished before, nothing to train; choose another folder with -o to run again"
        )
        write_report(run.folder)
        return
    run.terminal.note(run.describe_machine())
    for line in describe(recipe):
        run.terminal.note(line)
    if run.device.type == "cuda":
        recipe = with_room(recipe, torch.cuda.get_device_properties(run.device).total_memory / 1e9)
    start, tokenizer, splits = begin(run, recipe, run.folder, given.rows)
    pipeline = Pipeline(run, recipe, start, tokenizer, splits, given, run.folder)
    rehearse(pipeline)
    run.plan = plan_work(recipe)
    for stage in stages:
        if run.done(stage):
            run.terminal.stage(stage, "skipped")
            continue
        if run.should_stop():  # asked for while the stage before closed itself
            raise Interrupted(f"stopped before {stage}", "the same command carries on")
        run.terminal.stage(stage, "start")
        STAGE_RUNNERS[stage](pipeline)
        run.terminal.stage(stage, "end")
        write_report(run.folder)
    run.terminal.note(f"report: {run.folder / 'report.html'}")


def plan_work(recipe: Recipe) -> dict[str, float]:
    """Work of each stage in token passes, for the time left: a forward pass is 1, a training one 3.

    A reward model trains for 2 (it has no vocabulary to project to); a completion is taken to be 0.6 of its limit.
    """
    plan: dict[str, float] = {}
    for name in ("pretrain", "sft"):
        stage = getattr(recipe, name)
        if stage:
            plan[name] = 3 * MEAN_TOKENS * stage.steps * stage.batch
    if recipe.reward:
        plan["reward"] = 2 * 2 * MEAN_TOKENS * recipe.reward.steps * recipe.reward.batch
    if recipe.preference:
        plan["preference"] = (3 + 1) * 2 * MEAN_TOKENS * recipe.preference.steps * recipe.preference.batch
    if recipe.rl:
        rl = recipe.rl
        tokens = 0.6 * rl.max_tokens + 6
        plan["rl"] = rl.steps * rl.episodes * tokens * (5 + 3 * rl.epochs)
    if recipe.expert:
        e = recipe.expert
        plan["expert"] = 3 * MEAN_TOKENS * e.steps * e.batch + 5 * MEAN_TOKENS * e.prompts * e.samples
    if recipe.evaluated:
        plan["eval"] = 2 * recipe.eval.prompts * (0.6 * recipe.max_completion + 6) * 7
    return plan


def _supervised(stage: str) -> Callable[[Pipeline], None]:
    def run_stage(p: Pipeline) -> None:
        model = p.trunk(p.source_of(stage), trained=True, chooses=stage != "pretrain")
        make = masked_examples if stage == "pretrain" and model.masks else supervised_examples
        train = make(p.run, stage, p.splits["train"], p.tokenizer, "train")
        valid = make(p.run, stage, p.held_out, p.tokenizer, "held-out")
        for side, examples in (("train", train), ("held-out", valid)):
            require_room(model, side, ((e.row, (n := e.trained.index(True)), len(e.ids) - n) for e in examples))
        with p.measuring(stage, model) as at_end:
            run_supervised(p.run, stage, getattr(p.recipe, stage), model, p.tokenizer, train, valid, at_end)

    return run_stage


def _pairs(stage: str) -> Callable[[Pipeline], None]:
    def run_stage(p: Pipeline) -> None:
        cfg = getattr(p.recipe, stage)
        train = preference_pairs(p.run, stage, p.splits["train"], p.tokenizer, "train", cfg.pairs_per_group)
        valid = preference_pairs(p.run, stage, p.held_out, p.tokenizer, "held-out", cfg.pairs_per_group)
        model = p.trunk(p.source_of(stage), trained=True)
        learner: Learner = (
            RewardLearner(RewardModel(model).to(p.run.device)) if stage == "reward" else PolicyLearner(model, cfg)
        )
        run_pairs(p.run, cfg, learner, p.tokenizer, train, valid)

    return run_stage


def _rl(p: Pipeline) -> None:
    rl = p.recipe.rl
    assert rl is not None
    policy = p.trunk(p.source_of("rl"), trained=True)
    critic_trunk = p.trunk(p.source_of("rl"), trained=True) if rl.critic == "separate" else None
    model = ActorCritic(policy, rl.critic, critic_trunk).to(p.run.device)
    frozen = Frozen(
        reference=p.trunk(rl.teacher or p.source_of("rl"), trained=False) if rl.uses_reference else None,
        mask=p.trunk(p.source_of("rl"), trained=False) if rl.mask_every else None,
    )
    check_teacher(rl.teacher, frozen.reference, policy)
    prompts = make_prompts(p.run, p.splits["train"], p.tokenizer, "train")
    require_room(policy, "train", ((prompt.number, len(prompt.ids), rl.max_tokens) for prompt in prompts))
    engine = Engine(
        make_runner(policy, dtype=p.run.dtype),
        eos_id=p.tokenizer.eos_id,
        slots=p.recipe.limits.slots,
        seed=p.recipe.seed,
        text_of=p.tokenizer.decode,
        valid_vocab=p.tokenizer.vocab_size,
        mask_runner=make_runner(policy, dtype=p.run.dtype) if rl.mask_every > 1 else None,
    )
    scorer, watched = p.scorer(), p.watched("rl")
    try:
        run_rl(p.run, rl, Actors(model, frozen, engine, scorer, p.tokenizer, watched), prompts)
    finally:
        scorer.close()
        if watched:
            watched.close()


def _expert(p: Pipeline) -> None:
    cfg = p.recipe.expert
    assert cfg is not None
    train = make_prompts(p.run, p.splits["train"], p.tokenizer, "train", "expert")[: cfg.prompts]
    watched = make_prompts(p.run, p.held_out, p.tokenizer, "held-out", "expert")
    watched = watched[: max(1, len(train) // HELD_OUT_SHARE)]
    episodes = read_samples(p.run, (len(train) + len(watched)) * cfg.samples)
    if episodes is None:
        policy = p.trunk(p.source_before("expert"), trained=False)
        engine = p.engine(policy, 0)
        scorer = p.scorer("expert")
        try:
            episodes = draw_samples(p.run, cfg, engine, p.tokenizer, scorer, train, watched)
        finally:
            scorer.close()
        del engine, policy, scorer  # room for what is fitted
    model = p.trunk(p.source_of("expert"), trained=True)
    with p.measuring("expert", model) as at_end:
        run_expert(p.run, cfg, model, p.tokenizer, episodes, len(train), at_end)


STAGE_RUNNERS: dict[str, Callable[[Pipeline], None]] = {
    "pretrain": _supervised("pretrain"),
    "sft": _supervised("sft"),
    "reward": _pairs("reward"),
    "preference": _pairs("preference"),
    "rl": _rl,
    "expert": _expert,
    "eval": evaluate_run,
}


def _report_if_possible(run: Run) -> None:
    """A run that stops early still leaves a report of what it did; its own error is the one to show."""
    try:
        write_report(run.folder)
    except (UpslopeError, OSError) as error:
        run.terminal.note(f"no report: {error}")
