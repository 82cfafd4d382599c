"""From a recipe's [data] table to cleaned, split rows, and to what each stage trains on.

Every function records its account (rows read, kept, dropped and why) in the run.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from upslope.algo.random import permutation
from upslope.config import Data
from upslope.errors import DataError
from upslope.sources import resolve
from upslope.text import prepare
from upslope.text.examples import Examples, Pairs
from upslope.text.rows import load_rows, require_columns
from upslope.text.tokenizer import Tokenizer
from upslope.training.run import Run

Splits = dict[str, Dataset]


def load_splits(run: Run, data: Data, seed: int, rows: Any = None) -> Splits:
    """Read, clean and split the rows: train, valid, test. `rows` (a dataset or list) stands in for data.rows."""
    source = rows if rows is not None else resolve(data.rows)
    table = load_rows(source, limit=data.limit)
    columns = [data.text, data.prompt, data.completion, data.messages, data.chosen, data.rejected, data.label]
    wanted = [c for c in [*columns, data.margin, data.group, *data.keep] if c]
    name = data.rows if rows is None else "the rows given"
    require_columns(table, wanted, name)
    table, account = prepare.clean(
        table, text=data.text, min_chars=data.min_chars, max_chars=data.max_chars, keep=data.keep
    )
    run.account(f"rows: {account}")
    fractions = {"train": 1 - data.valid - data.test, "valid": data.valid, "test": data.test}
    splits, account = prepare.split(
        table, group=data.group, fractions=fractions, seed=seed, same=data.text or data.prompt
    )
    run.account(f"split: {account}")
    # in an order of their own, so that the first n of a side are a sample of all its groups
    return {name: side.select(permutation(len(side), seed, "rows", name)) for name, side in splits.items()}


def supervised_examples(run: Run, stage: str, rows: Dataset, tokenizer: Tokenizer, side: str) -> Examples:
    data = run.recipe.data
    if data.text:
        made = prepare.text_examples(rows, tokenizer, text=data.text, max_tokens=data.max_tokens)
    elif data.messages:
        made = prepare.chat_examples(rows, tokenizer, messages=data.messages, max_tokens=data.max_tokens)
    elif data.prompt and data.completion:
        made = prepare.completion_examples(
            rows, tokenizer, prompt=data.prompt, completion=data.completion, max_tokens=data.max_tokens
        )
    else:
        raise DataError(
            f"[{stage}] has nothing to learn from", "set data.text, data.messages, or prompt and completion"
        )
    examples, account = made
    run.account(f"{side} examples: {account}", stage)
    return examples


def preference_pairs(run: Run, stage: str, rows: Dataset, tokenizer: Tokenizer, side: str, per_group: int) -> Pairs:
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
        run.account(f"{side} pairs: {account}", stage)
        return pairs
    if not (data.text and data.label and data.prefer):
        raise DataError(f"[{stage}] needs texts to pair", "set data.text beside data.label and data.prefer")
    seed = run.recipe.seed
    found, account = prepare.pairs(
        rows, text=data.text, label=data.label, prefer=data.prefer, group=data.group, per_group=per_group, seed=seed
    )
    run.account(f"{side} pairs: {account}", stage)
    pairs, account = prepare.label_pairs(found, rows, tokenizer, text=data.text, max_tokens=data.max_tokens)
    if account.dropped:
        run.account(f"{side} pairs: {account}", stage)
    return pairs


def make_prompts(run: Run, rows: Dataset, tokenizer: Tokenizer, side: str, stage: str = "rl") -> list[prepare.Prompt]:
    """Prompts that leave room for the completions of a stage, rl or expert, within data.max_tokens."""
    data = run.recipe.data
    room = data.max_tokens - getattr(run.recipe, stage).max_tokens
    prompts, account = prepare.prompts(
        rows,
        tokenizer,
        prompt=data.prompt,
        text=data.text if data.prompt_words else None,
        words=data.prompt_words,
        messages=data.messages if not data.prompt else None,
        max_tokens=room,
    )
    run.account(f"{side} prompts: {account}", stage)
    return prompts
