"""A recipe from its first stage to its last: what is finished is skipped, what was begun carries on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from upslope.config import POLICY_STAGES, RL, Recipe, describe
from upslope.config.metrics import METRICS
from upslope.engine import Engine
from upslope.errors import DataError, Interrupted, ModelError, UpslopeError
from upslope.models.heads import ActorCritic, RewardModel
from upslope.models.open import load_model, make_runner
from upslope.models.trunk import Trunk
from upslope.observe.report import write_report
from upslope.rewards.language import language
from upslope.sources import resolve
from upslope.text.tokenizer import Tokenizer
from upslope.training.data import Splits, make_prompts, preference_pairs, supervised_examples
from upslope.training.encoder import encoder_folder
from upslope.training.expert import HELD_OUT_SHARE, draw_samples, read_samples, run_expert
from upslope.training.export import load_reward_model
from upslope.training.final import evaluate_policies, record_comparison
from upslope.training.judges import LikelihoodSource, SimilaritySource
from upslope.training.pairs import Learner, PolicyLearner, RewardLearner
from upslope.training.preference import run_pairs
from upslope.training.probe import ProbeSource
from upslope.training.rl import Actors, run_rl
from upslope.training.rollout import Frozen
from upslope.training.run import Run
from upslope.training.scoring import FunctionSource, LearnedSource, Scorer, Source, source_name
from upslope.training.start import begin
from upslope.training.supervised import run_supervised

MEAN_TOKENS = 32.0  # a first guess of an example's length, for the time left only


@dataclass
class Given:
    """The caller's own objects, which stand in for what the recipe names."""

    reward: Callable[..., Any] | None = None
    rows: Any = None

    @property
    def reward_name(self) -> str | None:
        """What the recipe calls the caller's reward; any other name is a source of its own."""
        if self.reward is None:
            return None
        module = getattr(self.reward, "__module__", "python")
        return f"{module}:{getattr(self.reward, '__qualname__', type(self.reward).__name__)}"


@dataclass
class Pipeline:
    """What the stages of one run share."""

    run: Run
    recipe: Recipe
    start: str  # the source of the recipe's model
    tokenizer: Tokenizer
    splits: Splits
    given: Given
    models: Path  # the folder that holds the finished stages

    def stage_folder(self, stage: str) -> Path:
        return self.models / stage

    def source_of(self, stage: str) -> str:
        """The model that a stage starts from: its own init, the nearest policy stage before it, or the recipe's."""
        init = getattr(self.recipe, stage).init
        return str(init) if init else self.source_before(stage)

    def source_before(self, stage: str) -> str:
        """The policy as it is when a stage begins."""
        before = [s for s in self.recipe.stages[: self.recipe.stages.index(stage)] if s in POLICY_STAGES]
        return str(self.stage_folder(before[-1]) / "model") if before else self.start

    def trunk(self, source: str, *, trained: bool) -> Trunk:
        """Load a model: fp32 master weights where it is trained, the compute dtype where it is frozen."""
        model = load_model(resolve(source), dtype=torch.float32 if trained else self.run.dtype)
        if model.config.vocab_size < self.tokenizer.vocab_size:
            tokens = self.tokenizer.vocab_size
            raise ModelError(
                f"the tokenizer has {tokens} tokens, the model {source} only {model.config.vocab_size}",
                "use the tokenizer that the model was trained with",
            )
        model.compute_dtype = self.run.dtype
        model.to(self.run.device)
        return model if trained else model.requires_grad_(False)

    def limit(self, key: str) -> Any:
        """A setting of [rl] that other stages share; its default where there is no [rl]."""
        return getattr(self.recipe.rl, key) if self.recipe.rl else RL.model_fields[key].default

    def source(self, name: str, stage: str) -> Source:
        """What a name in the recipe stands for: a metric, a model, a function of the user's (config/metrics.py)."""
        label, (word, _, argument) = source_name(name), name.partition(":")
        optim = getattr(getattr(self.recipe, stage), "optim", self.recipe.optim)
        budget, stop = optim.micro_tokens, self.run.should_stop
        if self.given.reward is not None and name == self.given.reward_name:
            return self.function_source(self.given.reward, getattr(self.given.reward, "__name__", "reward"))
        if word == "stage":
            model = load_reward_model(self.stage_folder("reward") / "model", dtype=self.run.dtype)
            model.trunk.compute_dtype = self.run.dtype
            model.to(self.run.device).requires_grad_(False)
            return LearnedSource(label, model, self.tokenizer.eos_id, budget, stop)
        if word == "likelihood":
            judge = load_model(resolve(argument), dtype=self.run.dtype)
            judge.compute_dtype = self.run.dtype
            judge.to(self.run.device).requires_grad_(False)
            return LikelihoodSource(label, judge, Tokenizer.load(resolve(argument)), budget, stop)
        if word == "language":
            return self.function_source(partial(language, code=argument), label)
        if name == "similarity":
            return SimilaritySource(label)
        return self.function_source(METRICS[name].source or name if name in METRICS else name, label)

    def function_source(self, source: str | Callable[..., Any], name: str) -> FunctionSource:
        """A function of the user's in its worker process, under the limits of [rl]."""
        seconds, gb = self.limit("timeout_s"), self.limit("memory_gb")
        return FunctionSource(source, name, timeout_s=seconds, memory_gb=gb, should_stop=self.run.should_stop)

    def scorer(self, stage: str = "rl") -> Scorer:
        """The rewards of [rl] or [expert], by weight."""
        rl = self.recipe.rl
        rewards = self.recipe.expert_rewards if stage == "expert" else rl.rewards if rl else {}
        return Scorer(
            [self.source(name, stage) for name in rewards],
            list(rewards.values()),
            self.limit("max_failures"),
            partial(self.tokenizer.pieces, skip_special=True),
        )


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
    stages = [*recipe.stages, "eval"] if recipe.rl else recipe.stages
    if all(run.done(stage) for stage in stages):
        run.terminal.note(
            f"{run.folder}: finished before, nothing to train; choose another folder with -o to run again"
        )
        write_report(run.folder)
        return
    run.terminal.note(f"{run.facts['processor']}; matrix products in {run.facts['dtype']}, weights in fp32")
    for line in describe(recipe):
        run.terminal.note(line)
    start, tokenizer, splits = begin(run, recipe, run.folder, given.rows)
    pipeline = Pipeline(run, recipe, start, tokenizer, splits, given, run.folder)
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
    if recipe.rl:
        plan["eval"] = 2 * recipe.eval.prompts * tokens * 7
    return plan


def _supervised(stage: str) -> Callable[[Pipeline], None]:
    def run_stage(p: Pipeline) -> None:
        train = supervised_examples(p.run, stage, p.splits["train"], p.tokenizer, "train")
        valid = supervised_examples(p.run, stage, _held_out(p.splits), p.tokenizer, "held-out")
        model = p.trunk(p.source_of(stage), trained=True)
        run_supervised(p.run, stage, getattr(p.recipe, stage), model, p.tokenizer, train, valid)

    return run_stage


def _pairs(stage: str) -> Callable[[Pipeline], None]:
    def run_stage(p: Pipeline) -> None:
        cfg = getattr(p.recipe, stage)
        train = preference_pairs(p.run, stage, p.splits["train"], p.tokenizer, "train", cfg.pairs_per_group)
        valid = preference_pairs(p.run, stage, _held_out(p.splits), p.tokenizer, "held-out", cfg.pairs_per_group)
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
    _check_teacher(rl.teacher, frozen.reference, policy)
    prompts = make_prompts(p.run, p.splits["train"], p.tokenizer, "train")
    longest = max(len(prompt.ids) for prompt in prompts) + rl.max_tokens
    if longest > policy.config.context:
        raise DataError(
            f"prompts of up to {longest - rl.max_tokens} tokens and rl.max_tokens = {rl.max_tokens} exceed the model's "
            f"context of {policy.config.context}",
            "lower rl.max_tokens or data.max_tokens",
        )
    engine = Engine(
        make_runner(policy, dtype=p.run.dtype),
        eos_id=p.tokenizer.eos_id,
        slots=rl.slots,
        seed=p.recipe.seed,
        text_of=p.tokenizer.decode,
        valid_vocab=p.tokenizer.vocab_size,
        mask_runner=make_runner(policy, dtype=p.run.dtype) if rl.mask_every > 1 else None,
    )
    scorer = p.scorer()
    try:
        run_rl(p.run, rl, Actors(model, frozen, engine, scorer, p.tokenizer), prompts)
    finally:
        scorer.close()


def _expert(p: Pipeline) -> None:
    cfg = p.recipe.expert
    assert cfg is not None
    train = make_prompts(p.run, p.splits["train"], p.tokenizer, "train", "expert")[: cfg.prompts]
    watched = make_prompts(p.run, _held_out(p.splits), p.tokenizer, "held-out", "expert")
    watched = watched[: max(1, len(train) // HELD_OUT_SHARE)]
    episodes = read_samples(p.run, (len(train) + len(watched)) * cfg.samples)
    if episodes is None:
        policy = p.trunk(p.source_before("expert"), trained=False)
        engine = Engine(
            make_runner(policy, dtype=p.run.dtype),
            eos_id=p.tokenizer.eos_id,
            slots=p.limit("slots"),
            seed=p.recipe.seed,
            text_of=p.tokenizer.decode,
            valid_vocab=p.tokenizer.vocab_size,
        )
        engine.load(policy, version=0)
        scorer = p.scorer("expert")
        try:
            episodes = draw_samples(p.run, cfg, engine, p.tokenizer, scorer, train, watched)
        finally:
            scorer.close()
        del engine, policy, scorer  # room for what is fitted
    model = p.trunk(p.source_of("expert"), trained=True)
    run_expert(p.run, cfg, model, p.tokenizer, episodes, len(train))


def _check_teacher(source: str | None, teacher: Trunk | None, policy: Trunk) -> None:
    """A teacher and its student choose among the same tokens, and see as far."""
    if source is None or teacher is None:
        return
    if teacher.config.vocab_size != policy.config.vocab_size:
        raise ModelError(
            f"the teacher {source} has {teacher.config.vocab_size} tokens, the policy {policy.config.vocab_size}",
            "choose a teacher of the same vocabulary",
        )


def evaluate_run(p: Pipeline, draw: int = 0) -> None:
    """Held-out prompts before and after rl; the policy's start, its end, and the original model are loaded frozen.

    draw numbers the set of random numbers that the completions are sampled with.
    """
    cfg = p.recipe.eval
    prompts = make_prompts(p.run, p.splits["test"], p.tokenizer, "test")[: cfg.prompts]
    before = p.trunk(p.source_of("rl"), trained=False)
    after = p.trunk(str(p.stage_folder("rl") / "model"), trained=False)
    base = p.trunk(p.start, trained=False)
    judges = _judges(p)
    scorer = p.scorer()
    try:
        outcomes = evaluate_policies(p.run, [before, after], base, p.tokenizer, scorer, judges, prompts, draw)
    finally:
        scorer.close()
        judges.close()
    weights = {f"judge: {source.name}": 0.0 for source in judges.sources}
    weights |= {f"reward: {s.name}": weight for s, weight in zip(scorer.sources, scorer.weights, strict=True)}
    found = record_comparison(p.run, prompts, outcomes, weights)
    closing = {name: {"before": row[0].value, "after": row[1].value} for name, row in found.items()}
    p.run.mark_done("eval", closing)


def _judges(p: Pipeline) -> Scorer:
    """The recipe's judges and, where its encoder is installed and rows have labels, the probe."""
    data, rl = p.recipe.data, p.recipe.rl
    assert rl is not None
    sources: list[Source] = [p.source(judge, "eval") for judge in p.recipe.eval.judges]
    folder = encoder_folder()
    if folder is not None and data.text and data.label and data.prefer:
        train, held_out = p.splits["train"], _held_out(p.splits)
        columns = {"text": data.text, "label": data.label, "prefer": data.prefer}
        probe = ProbeSource(folder, train, held_out, seed=p.recipe.seed, **columns)
        p.run.account(f"judge {probe.name}: right on {100 * probe.accuracy:.1f} % of unseen labelled rows", "eval")
        sources.append(probe)
    return Scorer(sources, [0.0] * len(sources), 1.0)


STAGE_RUNNERS: dict[str, Callable[[Pipeline], None]] = {
    "pretrain": _supervised("pretrain"),
    "sft": _supervised("sft"),
    "reward": _pairs("reward"),
    "preference": _pairs("preference"),
    "rl": _rl,
    "expert": _expert,
    "eval": evaluate_run,
}


def _held_out(splits: Splits) -> Any:
    """What the fitting stages report on: the validation side, so that the test side is opened once, at the end."""
    return splits["valid"]


def _report_if_possible(run: Run) -> None:
    """A run that stops early still leaves a report of what it did; its own error is the one to show."""
    try:
        write_report(run.folder)
    except (UpslopeError, OSError) as error:
        run.terminal.note(f"no report: {error}")
