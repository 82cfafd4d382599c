"""`upslope data`: what becomes of a recipe's rows, told before anything is trained.

What was kept, dropped and why, one example each; the sides of the split; near duplicates that stand on two of them; and
a few examples of each stage, token by token, with what is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from upslope.config import Recipe, Scratch
from upslope.models.open import Outline, outline
from upslope.sources import resolve
from upslope.text.examples import Example, Pair
from upslope.text.near import near_duplicates
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer, train_tokenizer
from upslope.training.data import (
    Splits,
    compared_column,
    load_splits,
    make_prompts,
    masked_examples,
    preference_pairs,
    require_room,
    supervised_examples,
)
from upslope.training.start import check_kind, labelled, texts_of

NEAR = 0.8  # resemblance from which two texts on two sides are told
CHECKED = 5000  # rows of each side that are compared for it
COLOURS = (("grey62", "grey46"), ("bold green", "bold cyan"))  # tokens in turn: given, trained on


class Preview:
    """Writes accounts to the screen."""

    def __init__(self, recipe: Recipe, *, plain: bool | None = None) -> None:
        self.recipe = recipe
        self.console = Console(highlight=False, soft_wrap=True, no_color=bool(plain))
        self.plain = not self.console.is_terminal if plain is None else plain

    def account(self, text: str, stage: str | None = None, examples: Sequence[str] = ()) -> None:
        """One account and an example of each reason."""
        self.say(f"{stage}: {text}" if stage else text)
        for example in examples:
            self.say(f"    {' '.join(example.split())}", "dim")

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style="" if self.plain else style))

    def tokens(self, pieces: Iterable[str], trained: Iterable[bool]) -> None:
        """An example token by token: what is trained on in colour, or between [[ and ]] where there is none."""
        line = Text("    ")
        inside, n = False, 0
        for n, (piece, learned) in enumerate(zip(pieces, trained, strict=True)):
            shown = piece.replace("\n", "\u23ce")
            if not self.plain:
                line.append(shown, style=COLOURS[learned][n % 2])
                continue
            mark = "[[" if learned and not inside else "]]" if inside and not learned else "|" if n else ""
            line.append(mark + shown)
            inside = learned
        line.append("]]" if self.plain and inside else "")
        self.console.print(line)


def preview(recipe: Recipe, *, examples: int = 2, rows: Any = None, plain: bool | None = None) -> None:
    """Print what becomes of a recipe's data. Raises DataError as a run would, where nothing is left."""
    book = Preview(recipe, plain=plain)
    made = recipe.model if isinstance(recipe.model, Scratch) else None
    source = resolve(recipe.model) if isinstance(recipe.model, str) else recipe.model
    model = outline(source)
    encoder = model.kind == "encoder"
    check_kind(recipe, model)
    splits = load_splits(book, recipe.data, recipe.seed, rows)
    tell_near(book, splits)
    if made:
        tokenizer = train_tokenizer(texts_of(splits["train"], recipe.data), made.vocab, mask=encoder)
        tokenizer.for_sources = model.needs_source
    else:
        tokenizer = Tokenizer.load(str(source), for_sources=model.needs_source)
    tokenizer = labelled(book, tokenizer, splits, recipe.data, model)
    for stage in recipe.stages:
        if stage == "pretrain" and encoder:
            show_masked(book, splits, tokenizer, examples)
        else:
            show_stage(book, stage, splits, tokenizer, examples, model)


def tell_near(book: Preview, splits: Splits) -> None:
    """Whether texts of the training side stand nearly the same on another one."""
    column = compared_column(book.recipe)
    parts = {name: [str(v) for v in side[column][:CHECKED]] for name, side in splits.items()}
    train = parts.pop("train")
    for name, texts in parts.items():
        found = near_duplicates([*train, *texts], NEAR)[len(train) :]
        pairs = [(n, j) for n, j in enumerate(found) if j is not None and j < len(train)]
        if not pairs:
            book.say(f"near duplicates: none of {len(texts)} texts of {name} is near one of {len(train)} of train")
            continue
        n, j = pairs[0]
        book.say(
            f"near duplicates: {len(pairs)} of {len(texts)} texts of {name} are near one of train "
            f"(resemblance {NEAR:g} or more); set data.near = {NEAR:g} to drop them"
            + ("" if book.recipe.data.group else ", or data.group to keep them on one side"),
            "bold yellow",
        )
        book.say(f"    {name}: {' '.join(texts[n].split())[:200]}", "dim")
        book.say(f"    train: {' '.join(train[j].split())[:200]}", "dim")


def show_masked(book: Preview, splits: Splits, tokenizer: Tokenizer, count: int) -> None:
    """The first texts that an encoder is pretrained on, whose tokens are masked anew at every step."""
    for text in masked_examples(book, "pretrain", splits["train"], tokenizer, "train")[:count]:
        book.say(f"  pretrain, row {text.row}, {len(text.ids)} tokens, of which some are masked at each step:")
        book.tokens(tokenizer.source_pieces(text.ids), [False] * len(text.ids))


def show_stage(book: Preview, stage: str, splits: Splits, tokenizer: Tokenizer, count: int, model: Outline) -> None:
    """What becomes of each side for a stage, and the first examples of what it learns from.

    Raises DataError for a row beyond the model's context.
    """
    cfg = getattr(book.recipe, stage)
    for side, rows in splits.items():
        shown = count if side == "train" else 0
        parts: Iterable[tuple[int, int, int]] = ()
        if stage in ("pretrain", "sft"):
            examples = supervised_examples(book, stage, rows, tokenizer, side)
            parts = ((e.row, n := e.trained.index(True), len(e.ids) - n) for e in examples)
            show_examples(book, stage, examples[:shown], tokenizer)
        elif stage in ("reward", "preference"):
            pairs = preference_pairs(book, stage, rows, tokenizer, side, cfg.pairs_per_group)
            show_pairs(book, stage, pairs[:shown], tokenizer)
        else:
            prompts = make_prompts(book, rows, tokenizer, side, stage)
            parts = ((p.number, len(p.ids), cfg.max_tokens) for p in prompts)
            show_prompts(book, stage, prompts[:shown], tokenizer)
        require_room(model, side, parts)


def show_examples(book: Preview, stage: str, examples: Iterable[Example], tokenizer: Tokenizer) -> None:
    for example in examples:
        book.say(f"  {stage}, row {example.row}, {len(example.ids)} tokens, {sum(example.trained)} trained on:")
        given = example.trained.index(True) if True in example.trained else len(example.ids)
        pieces = tokenizer.source_pieces(example.ids[:given]) + tokenizer.pieces(example.ids[given:])
        book.tokens(pieces, example.trained)


def show_pairs(book: Preview, stage: str, pairs: Iterable[Pair], tokenizer: Tokenizer) -> None:
    for pair in pairs:
        for name, ids in (("better", pair.chosen), ("other", pair.rejected)):
            book.say(f"  {stage}, the {name} side, {len(ids)} tokens:")
            book.tokens(tokenizer.pieces(ids), [n >= pair.prompt_length for n in range(len(ids))])


def show_prompts(book: Preview, stage: str, prompts: Iterable[Prompt], tokenizer: Tokenizer) -> None:
    for prompt in prompts:
        book.say(f"  {stage}, row {prompt.number}, a prompt of {len(prompt.ids)} tokens:")
        book.tokens(tokenizer.source_pieces(prompt.ids), [False] * len(prompt.ids))
        if "reference" in prompt.row:
            book.say(f"    reference: {prompt.row['reference']!r}")
