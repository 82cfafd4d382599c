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
from upslope.models.open import needs_source, reads_only
from upslope.sources import resolve
from upslope.text.near import near_duplicates
from upslope.text.tokenizer import Tokenizer, train_tokenizer
from upslope.training.data import (
    Splits,
    compared_column,
    load_splits,
    make_prompts,
    masked_examples,
    preference_pairs,
    supervised_examples,
)
from upslope.training.start import check_writes, labelled, texts_of

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
    source = resolve(recipe.model) if isinstance(recipe.model, str) else ""
    encoder = made.kind == "encoder" if made else reads_only(source)
    check_writes(recipe, encoder)
    splits = load_splits(book, recipe.data, recipe.seed, rows)
    tell_near(book, splits)
    if made:
        tokenizer = train_tokenizer(texts_of(splits["train"], recipe.data), made.vocab, mask=encoder)
        tokenizer.for_sources = made.kind in ("encdec", "encoder")
    else:
        tokenizer = Tokenizer.load(source, for_sources=needs_source(source))
    tokenizer = labelled(book, tokenizer, splits, recipe.data)
    for stage in recipe.stages:
        if stage == "pretrain" and encoder:
            show_masked(book, splits, tokenizer, examples)
        else:
            show_stage(book, stage, splits, tokenizer, examples)


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
            f"(resemblance {NEAR:g} or more); set data.near = {NEAR:g} to drop them, or data.group",
            "bold yellow",
        )
        book.say(f"    {name}: {' '.join(texts[n].split())[:200]}", "dim")
        book.say(f"    train: {' '.join(train[j].split())[:200]}", "dim")


def show_masked(book: Preview, splits: Splits, tokenizer: Tokenizer, count: int) -> None:
    """The first texts that an encoder is pretrained on, whose tokens are masked anew at every step."""
    for text in masked_examples(book, "pretrain", splits["train"], tokenizer, "train")[:count]:
        book.say(f"  pretrain, row {text.row}, {len(text.ids)} tokens, of which some are masked at each step:")
        book.tokens(tokenizer.source_pieces(text.ids), [False] * len(text.ids))


def show_stage(book: Preview, stage: str, splits: Splits, tokenizer: Tokenizer, count: int) -> None:
    """The first examples of what a stage learns from."""
    cfg = getattr(book.recipe, stage)
    if stage in ("pretrain", "sft"):
        for example in supervised_examples(book, stage, splits["train"], tokenizer, "train")[:count]:
            book.say(f"  {stage}, row {example.row}, {len(example.ids)} tokens, {sum(example.trained)} trained on:")
            given = example.trained.index(True) if True in example.trained else len(example.ids)
            pieces = tokenizer.source_pieces(example.ids[:given]) + tokenizer.pieces(example.ids[given:])
            book.tokens(pieces, example.trained)
    elif stage in ("reward", "preference"):
        pairs = preference_pairs(book, stage, splits["train"], tokenizer, "train", cfg.pairs_per_group)
        for pair in pairs[:count]:
            for name, ids in (("better", pair.chosen), ("other", pair.rejected)):
                book.say(f"  {stage}, the {name} side, {len(ids)} tokens:")
                book.tokens(tokenizer.pieces(ids), [n >= pair.prompt_length for n in range(len(ids))])
    else:
        for prompt in make_prompts(book, splits["train"], tokenizer, "train", stage)[:count]:
            book.say(f"  {stage}, row {prompt.number}, a prompt of {len(prompt.ids)} tokens:")
            book.tokens(tokenizer.source_pieces(prompt.ids), [False] * len(prompt.ids))
            if "reference" in prompt.row:
                book.say(f"    reference: {prompt.row['reference']!r}")
