"""What the stages of one run share: its models by source, its scores by name, its rows and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from upslope.config import POLICY_STAGES, RL, Optim, Recipe, source_name
from upslope.config.metrics import METRICS
from upslope.engine import Engine, Sampling
from upslope.errors import ModelError
from upslope.models.open import load_model, make_runner
from upslope.models.trunk import Trunk
from upslope.rewards.answers import weighted_accuracy, weights_of
from upslope.rewards.language import language
from upslope.rewards.reference import COLUMN as REFERENCE
from upslope.sources import resolve
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer
from upslope.training.data import Splits, make_prompts, require_room
from upslope.training.export import load_reward_model
from upslope.training.heldout import MetricSource, TaskMetrics, Watched
from upslope.training.judges import LikelihoodSource, SimilaritySource
from upslope.training.run import Run
from upslope.training.scoring import FunctionSource, LearnedSource, Scorer, Source

TOKENS_PER_GB = 128  # of a GPU: 10k tokens on a card of 85 GB


def with_room(recipe: Recipe, gpu_gb: float) -> Recipe:
    """The recipe with micro-batches that suit a GPU of so many GB, wherever it does not say how many tokens they have.

    The default is made for a CPU; on a GPU a small micro-batch leaves most of it idle. No result depends on it.
    """
    tokens = max(Optim().micro_tokens, int(TOKENS_PER_GB * gpu_gb))

    def larger(optim: Optim) -> Optim:
        known = "micro_tokens" in optim.model_fields_set
        return optim if known else optim.model_copy(update={"micro_tokens": tokens})

    changed: dict[str, Any] = {"optim": larger(recipe.optim)}
    for name in recipe.stages:
        stage = getattr(recipe, name)
        if hasattr(stage, "optim"):
            changed[name] = stage.model_copy(update={"optim": larger(stage.optim)})
    return recipe.model_copy(update=changed)


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

    def trunk(self, source: str, *, trained: bool, chooses: bool = True) -> Trunk:
        """Load a model: fp32 master weights where it is trained, the compute dtype where it is frozen.

        chooses: among the labels of the data, where it has those.
        """
        model = load_model(resolve(source), dtype=torch.float32 if trained else self.run.dtype)
        if model.needs_source != self.tokenizer.for_sources:
            kinds = ("an encoder-decoder", "a model without an encoder")
            found, wanted = kinds if model.needs_source else kinds[::-1]
            raise ModelError(f"{source} is {found}, the recipe's model is {wanted}", "use models of one kind in a run")
        if self.tokenizer.labels and chooses:
            model.take_labels(self.tokenizer.labels, self.tokenizer.separator)
        if model.config.vocab_size < self.tokenizer.vocab_size:
            tokens = self.tokenizer.vocab_size
            raise ModelError(
                f"the tokenizer has {tokens} tokens, the model {source} only {model.config.vocab_size}",
                "use the tokenizer that the model was trained with",
            )
        if model.remark:
            self.run.account(f"the model: {model.remark}")
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
            return self.function_source(self.given.reward, label)
        if word == "stage":
            model = load_reward_model(self.stage_folder("reward") / "model", dtype=self.run.dtype)
            model.trunk.compute_dtype = self.run.dtype
            model.to(self.run.device).requires_grad_(False)
            return LearnedSource(label, model, self.tokenizer.eos_id, budget, stop)
        if word == "likelihood":
            judge = load_model(resolve(argument), dtype=self.run.dtype)
            if judge.masks:
                raise ModelError(f"{name}: an encoder writes no text and has no likelihood", "name a language model")
            judge.compute_dtype = self.run.dtype
            judge.to(self.run.device).requires_grad_(False)
            tokenizer = Tokenizer.load(resolve(argument), for_sources=judge.needs_source)
            return LikelihoodSource(label, judge, tokenizer, budget, stop)
        if word == "language":
            return self.function_source(partial(language, code=argument), label)
        if name == "weighted_accuracy":
            assert self.recipe.task.weights is not None  # recipe.py asks for them
            worth = weights_of(list(self.splits["train"].select_columns([REFERENCE])), self.recipe.task.weights)
            return self.function_source(partial(weighted_accuracy, weights=worth), label)
        if name == "similarity":
            return SimilaritySource(label)
        return self.function_source(METRICS[name].source or name if name in METRICS else name, label)

    def near_source(self, name: str, stage: str) -> Source:
        """As `source`, but a trusted metric in this process."""
        trusted = METRICS[name].trusted if name in METRICS else None
        return MetricSource(name, trusted) if trusted else self.source(name, stage)

    def function_source(self, source: str | Callable[..., Any], name: str) -> FunctionSource:
        """A function of the user's in its worker process, under the recipe's limits."""
        seconds, gb = self.recipe.limits.timeout_s, self.recipe.limits.memory_gb
        return FunctionSource(source, name, timeout_s=seconds, memory_gb=gb, should_stop=self.run.should_stop)

    def scorer(self, stage: str = "rl") -> Scorer:
        """The rewards of [rl] or [expert], by weight."""
        rl = self.recipe.rl
        rewards = self.recipe.expert_rewards if stage == "expert" else rl.rewards if rl else {}
        return Scorer(
            [self.source(name, stage) for name in rewards],
            list(rewards.values()),
            self.recipe.limits.max_failures,
            partial(self.tokenizer.pieces, skip_special=True),
        )

    @property
    def held_out(self) -> Dataset:
        """What is reported on before the end: the validation side, so that the test side is opened once."""
        return self.splits["valid"]

    def engine(self, model: Trunk, version: int) -> Engine:
        """A new engine with a model's weights."""
        engine = Engine(
            make_runner(model, dtype=self.run.dtype),
            eos_id=self.tokenizer.eos_id,
            slots=self.recipe.limits.slots,
            seed=self.recipe.seed,
            text_of=self.tokenizer.decode,
            valid_vocab=self.tokenizer.vocab_size,
        )
        engine.load(model, version=version)
        return engine

    def sampling(self) -> Sampling:
        """How completions that are measured are sampled: as [eval] says, else as rl does."""
        cfg, writes = self.recipe.eval, self.recipe.rl or self.recipe.expert
        temperature = self.limit("temperature") if cfg.temperature is None else cfg.temperature
        return Sampling(
            max_tokens=self.recipe.max_completion,
            temperature=temperature,
            top_k=self.limit("top_k"),
            top_p=self.limit("top_p"),
            stop=writes.stop if writes else (),
        )

    def require_room(self, model: Trunk, side: str, prompts: Sequence[Prompt]) -> None:
        """Check that measured completions fit a model's context. Raises DataError, with the first row that does not."""
        require_room(model, side, ((p.number, len(p.ids), self.recipe.max_completion) for p in prompts))

    def task_metrics(self, without: Collection[str] = ()) -> TaskMetrics:
        """The metrics of [task] but some: the trusted ones in this process, the others in one of their own."""

        names = [name for name in self.recipe.task.metrics if name not in without]
        return TaskMetrics(names, lambda name: self.near_source(name, "eval"))

    def watched(self, stage: str) -> Watched | None:
        """What is measured on the way, on the validation side: [task], or for rl.best_by the reward alone."""
        by_reward = stage == "rl" and self.recipe.rl is not None and self.recipe.rl.best_by is not None
        if not self.recipe.task.metrics and not by_reward:
            return None
        prompts = make_prompts(self.run, self.held_out, self.tokenizer, "held-out", stage)
        prompts = prompts[: self.recipe.eval.watched]
        return Watched(prompts, self.task_metrics(), self.sampling(), self.tokenizer)

    @contextmanager
    def measuring(self, stage: str, model: Trunk) -> Iterator[Callable[[int], dict[str, float]] | None]:
        """What measures [task] on a stage's model when that is done, given the number of steps; None without [task]."""
        watched = None if stage == "pretrain" and model.masks else self.watched(stage)  # it writes nothing yet
        if watched:
            self.require_room(model, "held-out", watched.prompts)
        try:
            yield partial(watched.measure_model, self, stage, model) if watched else None
        finally:
            if watched:
                watched.close()


def check_teacher(source: str | None, teacher: Trunk | None, policy: Trunk) -> None:
    """A teacher and its student choose among the same tokens. Raises ModelError."""
    if source is None or teacher is None:
        return
    if teacher.config.vocab_size != policy.config.vocab_size:
        raise ModelError(
            f"the teacher {source} has {teacher.config.vocab_size} tokens, the policy {policy.config.vocab_size}",
            "choose a teacher of the same vocabulary",
        )
