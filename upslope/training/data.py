"""From a recipe's [data] table to cleaned, split rows, and to what each stage trains on.

Every function records its account (rows read, kept, dropped and why) in the run.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from datasets import Dataset

from upslope.algo.random import permutation
from upslope.config import Data, Recipe, Task
from upslope.config.recipe import PROMPT
from upslope.errors import DataError
from upslope.models.open import Outline
from upslope.models.trunk import Trunk, tokens_seen
from upslope.rewards.reference import COLUMN as REFERENCE
from upslope.sources import resolve
from upslope.text import cleaning, prepare
from upslope.text.examples import Examples, Pairs
from upslope.text.labels import LabelTokenizer, class_examples, labels_of, with_known_labels
from upslope.text.near import without_near
from upslope.text.passages import PassageTokenizer, passage_examples, passage_prompts
from upslope.text.rows import load_rows, require_columns
from upslope.text.tokenizer import Tokenizer
from upslope.training.masked import masked_texts, text_pairs

Splits = dict[str, Dataset]


class Book(Protocol):
    """Where accounts are written: a run, or the screen of `upslope data`."""

    recipe: Recipe

    def account(self, text: str, stage: str | None = None, examples: Sequence[str] = ()) -> None: ...


def load_splits(run: Book, data: Data, seed: int, rows: Any = None) -> Splits:
    """Read, clean and split the rows: train, valid, test. `rows` (a dataset or list) stands in for data.rows."""
    task = run.recipe.task
    source = rows if rows is not None else resolve(data.rows)
    table = cleaning.numbered(load_rows(source, limit=data.limit))
    made = PROMPT if data.prompt == PROMPT else None
    columns = [data.text, data.prompt, data.completion, data.messages, data.chosen, data.rejected, data.label]
    columns += [data.classes, data.passages]
    columns += [*task.columns, task.reference, task.source, data.margin, data.group, *data.keep]
    name = data.rows if rows is None else "the table given"
    require_columns(table, list(dict.fromkeys(c for c in columns if c and c != made)), name)
    table = with_task(table, task, name)
    table, account = cleaning.clean(
        table,
        text=compared_column(run.recipe),
        may_be_blank=not data.text and not made,
        min_chars=data.min_chars,
        max_chars=data.max_chars,
        keep=data.keep,
        required=[c for c in dict.fromkeys([*task.columns, task.reference, data.group]) if c],
        equal=what_repeats(run.recipe, table.column_names),
    )
    run.account(f"rows: {account}", None, account.examples())
    if data.near is not None:
        table, account = without_near(table, compared_column(run.recipe), data.near)
        run.account(f"near duplicates: {account}", None, account.examples())
    fractions = {"train": 1 - data.valid - data.test, "valid": data.valid, "test": data.test}
    splits, account = cleaning.split(
        table, group=data.group, fractions=fractions, seed=seed, same=data.text or data.prompt or data.messages
    )
    run.account(f"split: {account}", None, account.examples())
    if data.classes:
        labels = labels_of(splits["train"], data.classes)
        for side in (name for name in ("valid", "test") if len(splits[name])):
            splits[side], account = with_known_labels(splits[side], labels, data.classes)
            if account.dropped:
                run.account(f"{side} rows: {account}")
    # in an order of their own, so that the first n of a side are a sample of all its groups
    return {name: side.select(permutation(len(side), seed, "rows", name)) for name, side in splits.items()}


def compared_column(recipe: Recipe) -> str:
    """The column whose texts say whether two rows are alike: what a row is about, not the frame around it."""
    data = recipe.data
    column = data.text or recipe.task.source_column or data.prompt or data.messages or data.chosen
    assert column is not None  # [data] names one
    return column


def what_repeats(recipe: Recipe, columns: Sequence[str]) -> list[str]:
    """The columns that all agree where a row is a repeat: what is learned from, or all where that is prompts alone."""
    data, task = recipe.data, recipe.task
    if data.text:
        return [data.text]
    ends = [task.reference, data.completion, data.messages, data.chosen, data.rejected, data.passages, data.classes]
    learned = [column for column in ends if column in columns]
    if not learned:
        return [column for column in columns if column != cleaning.ROW_NUMBER]
    about: list[str | None] = [*task.columns] or [data.prompt]
    return [column for column in dict.fromkeys([*about, *learned]) if column]


class _Columns(string.Formatter):
    """Fields of a template are columns, a column called 0 too."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[str(key)]


def with_task(table: Dataset, task: Task, name: str) -> Dataset:
    """The rows with their prompts by the task's template and their references in columns of known names.

    Raises DataError where the rows have a column of such a name already, which is another.
    """
    added: dict[str, list[Any]] = {}
    if task.prompt:
        parts = [table[column] for column in task.columns]
        added[PROMPT] = [
            _Columns().vformat(task.prompt, (), dict(zip(task.columns, row, strict=True)))
            for row in zip(*parts, strict=True)
        ]
    if task.reference:
        texts = [_as_text(value) for value in table[task.reference]]
        if task.reference == REFERENCE:  # a column of that name already: its values as texts
            table = table.remove_columns(REFERENCE)
        added[REFERENCE] = texts
    for column, values in added.items():
        if column in table.column_names:
            raise DataError(f"{name} has a column {column!r}, which [task] makes", "rename it, or name it in [task]")
        table = table.add_column(column, values)
    return table


def _as_text(value: Any) -> str | list[str] | None:
    """A reference as a text, or as the list of the several that it is; None where there is none."""
    if isinstance(value, list | tuple):
        return [str(v) for v in value] if all(v is not None for v in value) else None
    return None if value is None else str(value)


def supervised_examples(run: Book, stage: str, rows: Dataset, tokenizer: Tokenizer, side: str) -> Examples:
    data, reference = run.recipe.data, run.recipe.task.reference
    if isinstance(tokenizer, PassageTokenizer):
        made = passage_examples(
            rows,
            tokenizer,
            prompt=str(data.prompt),
            passages=str(data.passages),
            answer=str(data.completion),
            max_tokens=data.max_tokens,
        )
    elif isinstance(tokenizer, LabelTokenizer):
        made = class_examples(
            rows, tokenizer, text=str(data.prompt or data.text), classes=str(data.classes), max_tokens=data.max_tokens
        )
    elif data.text and data.prompt_words and tokenizer.for_sources:
        made = prepare.opening_examples(
            rows, tokenizer, text=data.text, words=data.prompt_words, max_tokens=data.max_tokens
        )
    elif data.text:
        made = prepare.text_examples(rows, tokenizer, text=data.text, max_tokens=data.max_tokens)
    elif data.messages:
        made = prepare.chat_examples(rows, tokenizer, messages=data.messages, max_tokens=data.max_tokens)
    elif data.prompt and data.completion:
        completion = REFERENCE if data.completion == reference else data.completion
        made = prepare.completion_examples(
            rows, tokenizer, prompt=data.prompt, completion=completion, max_tokens=data.max_tokens
        )
    else:
        raise DataError(
            f"[{stage}] has nothing to learn from", "set data.text, data.messages, or prompt and completion"
        )
    examples, account = made
    run.account(f"{side} examples: {account}", stage, account.examples())
    return examples


def masked_examples(run: Book, stage: str, rows: Dataset, tokenizer: Tokenizer, side: str) -> Examples:
    """Texts whose tokens are masked anew at every step."""
    data = run.recipe.data
    text = data.text or data.prompt
    if not text:
        raise DataError(f"[{stage}] has nothing to mask", "set data.text")
    examples, account = (text_pairs if data.next else masked_texts)(
        rows, tokenizer, text=text, max_tokens=data.max_tokens
    )
    run.account(f"{side} texts: {account}", stage, account.examples())
    return examples


def preference_pairs(run: Book, stage: str, rows: Dataset, tokenizer: Tokenizer, side: str, per_group: int) -> Pairs:
    """Pairs for a stage: from chosen and rejected columns, or whole texts from the labels of one group's rows."""
    data = run.recipe.data
    if data.chosen and data.rejected:
        pairs, account = prepare.pair_examples(
            rows,
            tokenizer,
            chosen=data.chosen,
            rejected=data.rejected,
            prompt=data.prompt,
            max_tokens=data.max_tokens,
            margin=data.margin,
        )
        run.account(f"{side} pairs: {account}", stage, account.examples())
        return pairs
    if not (data.text and data.label and data.prefer):
        raise DataError(f"[{stage}] needs texts to pair", "set data.text beside data.label and data.prefer")
    seed = run.recipe.seed
    found, account = prepare.pairs(
        rows, text=data.text, label=data.label, prefer=data.prefer, group=data.group, per_group=per_group, seed=seed
    )
    run.account(f"{side} pairs: {account}", stage, account.examples())
    pairs, account = prepare.label_pairs(found, rows, tokenizer, text=data.text, max_tokens=data.max_tokens)
    if account.dropped:
        run.account(f"{side} pairs: {account}", stage, account.examples())
    return pairs


def require_room(model: Trunk | Outline, side: str, parts: Iterable[tuple[int, int, int]]) -> None:
    """Check (row, prompt tokens, completion tokens) against the context. Raises DataError for the first too long."""
    context = model.context
    for row, prompt, completion in parts:
        if context is not None and tokens_seen(model.needs_source, prompt, completion) > context:
            raise DataError(
                f"row {row} of the {side} side, {prompt} tokens to start from and {completion} to write, exceeds the "
                f"model's context of {context}",
                f"lower data.max_tokens to {context}, which drops such rows, or the stage's max_tokens",
            )


def make_prompts(run: Book, rows: Dataset, tokenizer: Tokenizer, side: str, stage: str = "rl") -> list[prepare.Prompt]:
    """Prompts that leave room for the completions of a stage within data.max_tokens: those that it samples, else those
    that are measured."""
    data = run.recipe.data
    room = data.max_tokens - (getattr(getattr(run.recipe, stage), "max_tokens", None) or run.recipe.max_completion)
    if isinstance(tokenizer, PassageTokenizer):
        made, account = passage_prompts(
            rows,
            tokenizer,
            prompt=str(data.prompt),
            passages=str(data.passages),
            answer=run.recipe.task.reference,
            max_tokens=data.max_tokens,
        )
        run.account(f"{side} prompts: {account}", stage, account.examples())
        return made
    prompts, account = prepare.prompts(
        rows,
        tokenizer,
        prompt=data.text if data.classes and not data.prompt else data.prompt,
        text=data.text if data.prompt_words else None,
        words=data.prompt_words,
        messages=data.messages if not data.prompt else None,
        max_tokens=room,
    )
    run.account(f"{side} prompts: {account}", stage, account.examples())
    return prompts
