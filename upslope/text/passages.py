"""Choosing a passage: a source is a text and its passages, and the one action is the number of a passage, from 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from upslope.errors import DataError
from upslope.text.cleaning import Account, row_numbers
from upslope.text.examples import Example, Examples
from upslope.text.labels import LabelTokenizer
from upslope.text.prepare import Prompt
from upslope.text.tokenizer import Tokenizer


class PassageTokenizer(LabelTokenizer):
    """Reads a text and its passages as one source, each ended by the EOS; writes the number of a passage."""

    def __init__(self, tokenizer: Tokenizer, most: int, context: int | None = None) -> None:
        """most: passages of a row; context: tokens that the encoder sees at once, as it reads each by itself."""
        super().__init__(tokenizer, [str(n) for n in range(most)])
        self.separator = self.eos = tokenizer.eos_id
        self.context = context

    def joined(self, text: Any, passages: Any) -> tuple[list[int], str]:
        """(ids, "") of a source, or ([], why it is none)."""
        if not isinstance(passages, list | tuple) or not all(isinstance(p, str | None) for p in passages):
            return [], "whose passages are no list of texts"
        if len(passages) < 2:
            return [], "with fewer than two passages"
        if not isinstance(text, str) or not text.strip():
            return [], "with an empty source"
        if not all(p and p.strip() for p in passages):
            return [], "with an empty passage"
        parts = [self.encode(part, special=False) for part in (text, *passages)]
        if any(self.separator in part for part in parts):
            return [], "whose text has the token that ends a passage"
        if self.context and max(map(len, parts)) + 2 > self.context:  # a first token and an EOS stand around each
            return (
                [],
                f"with a text or passage of more than the {self.context - 2} tokens that the encoder has room for",
            )
        first = self.encode_prompt(text)[0]
        return [first, *(token for part in parts for token in [*part, self.eos])], ""


def most_passages(splits: Mapping[str, Dataset], passages: str) -> int:
    """The most passages of a row, on any side. Raises DataError where no row has two."""
    counts = [len(value) for rows in splits.values() for value in rows[passages] if isinstance(value, list | tuple)]
    if max(counts, default=0) < 2:
        raise DataError(
            f"no row has two passages in column {passages!r}: nothing to choose", "name a column of lists of texts"
        )
    return max(counts)


def chosen(value: Any, passages: Sequence[str]) -> int | None:
    """The number of the right passage, also one written as text; None where there is no passage of that number."""
    try:
        number = None if isinstance(value, bool) else int(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and str(number) == str(value) and 0 <= number < len(passages) else None


def passage_examples(
    rows: Dataset, tokenizer: PassageTokenizer, *, prompt: str, passages: str, answer: str, max_tokens: int
) -> tuple[Examples, Account]:
    """A text with its passages as a source, and the number of the right one as the one token that is learned."""
    account = Account(len(rows), unit="examples")
    made = Examples()
    for i, text, group, value in zip(row_numbers(rows), rows[prompt], rows[passages], rows[answer], strict=True):
        ids, reason = tokenizer.joined(text, group)
        number = None if reason else chosen(value, group)
        if reason or number is None:
            account.drop(reason or f"whose {answer} is no number of a passage, from 0", i, value)
        elif len(ids) > max_tokens:
            account.drop(f"longer than {max_tokens} tokens", i, text)
        else:
            made.append(Example([*ids, number], [False] * len(ids) + [True], i))
    return made, account.close(len(made))


def passage_prompts(
    rows: Dataset, tokenizer: PassageTokenizer, *, prompt: str, passages: str, answer: str | None, max_tokens: int
) -> tuple[list[Prompt], Account]:
    """Sources to choose from. Where the right passage is known (answer) and there is none of its number, none."""
    account = Account(len(rows), unit="prompts")
    made = []
    for i, row in zip(row_numbers(rows), rows, strict=True):
        ids, reason = tokenizer.joined(row[prompt], row[passages])
        if not reason and answer and chosen(row[answer], row[passages]) is None:
            reason = f"whose {answer} is no number of a passage, from 0"
        if reason:
            account.drop(reason, i, row[answer] if answer else "")
        elif len(ids) > max_tokens:
            account.drop(f"longer than {max_tokens} tokens", i, row[prompt])
        else:
            listed = "\n".join(f"  {n}: {text}" for n, text in enumerate(row[passages]))
            made.append(Prompt(ids, f"{row[prompt]}\n{listed}", row, i))
    return made, account.close(len(made))
