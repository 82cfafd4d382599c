"""From clean rows to what a stage trains on, with an account of everything that was dropped.

Every function returns (what was made, Account) and raises DataError, naming the chief reason, when nothing is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from upslope.algo.random import stream
from upslope.errors import DataError
from upslope.text.cleaning import Account, row_numbers
from upslope.text.examples import Example, Examples, Pair, Pairs, Tokens
from upslope.text.openings import Words, opened, word_count
from upslope.text.tokenizer import Tokenizer

Learned = tuple[list[int], list[bool]]  # the ids of an example, and which of them are learned


@dataclass(frozen=True)
class Prompt:
    """What a completion starts from: ids, the text they stand for, and the whole row, by its number, for rewards."""

    ids: list[int]
    text: str
    row: dict[str, Any]
    number: int = field(default=0, compare=False)


def text_examples(rows: Dataset, tokenizer: Tokenizer, *, text: str, max_tokens: int) -> tuple[Examples, Account]:
    """Whole texts, an EOS behind each; every token is learned. Raises DataError for a model that reads sources."""
    _refuse_sources(tokenizer, "whole texts", "set data.prompt and data.completion, or data.prompt_words")
    made = ([*tokenizer.encode(value), tokenizer.eos_id] for value in rows[text])
    return _fitting(rows, ((ids, [True] * len(ids)) for ids in made), max_tokens)


def completion_examples(
    rows: Dataset, tokenizer: Tokenizer, *, prompt: str, completion: str, max_tokens: int
) -> tuple[Examples, Account]:
    """Prompt and completion, of several the first; the completion and its EOS are learned."""
    ends = (end[0] if isinstance(end, list) and end else end for end in rows[completion])
    return _continued(rows, zip(rows[prompt], ends, strict=True), tokenizer, max_tokens)


def opening_examples(
    rows: Dataset, tokenizer: Tokenizer, *, text: str, words: Words, max_tokens: int, seed: int = 0
) -> tuple[Examples, Account]:
    """The first words of a text (those that `prompts` takes) as a source, and the rest as what is written to it."""
    parts = (opened(value, word_count(value, words, seed)) for value in rows[text])
    return _continued(rows, parts, tokenizer, max_tokens)


def _continued(
    rows: Dataset, parts: Iterable[tuple[Any, Any]], tokenizer: Tokenizer, max_tokens: int
) -> tuple[Examples, Account]:
    def made() -> Iterator[Learned | str]:
        for start, end in parts:
            if start is None or end is None or end == "" or end == []:
                yield "without a prompt" if start is None else "without a completion"
                continue
            if not isinstance(start, str) or not isinstance(end, str):
                yield "that are no text"
                continue
            first = tokenizer.encode_prompt(start)
            second = [*tokenizer.encode(end, special=False), tokenizer.eos_id]
            without = tokenizer.for_sources and not first
            learned = [False] * len(first) + [True] * len(second)
            yield "with an empty source" if without else ([*first, *second], learned)

    return _fitting(rows, made(), max_tokens)


def chat_examples(rows: Dataset, tokenizer: Tokenizer, *, messages: str, max_tokens: int) -> tuple[Examples, Account]:
    """Conversations; the assistant's turns and their ends are learned."""

    def made() -> Iterator[Learned | str]:
        for turns in rows[messages]:
            if not is_chat(turns):
                yield "without turns of role and content"
            elif all(turn["role"] != "assistant" for turn in turns):
                yield "without a turn of the assistant"
            else:
                yield tokenizer.chat_example(turns)

    return _fitting(rows, made(), max_tokens)


def pairs(
    rows: Dataset, *, text: str, label: str, prefer: str, group: str | None, per_group: int, seed: int
) -> tuple[list[tuple[int, int]], Account]:
    """(better row, other row) pairs within each group: rows labelled `prefer` above the others, in a keyed order.

    Each row is used as few times as `per_group` allows: the shorter side is gone through again when it is used up.
    Without groups all rows are one, and every row of the shorter side gets a pair. Rows without a label get none.
    """
    sides: dict[str, tuple[list[int], list[int]]] = {}
    labels, groups, numbers = rows[label], rows[group] if group else [""] * len(rows), row_numbers(rows)
    unlabelled = 0
    for i, (value, name) in enumerate(zip(labels, groups, strict=True)):
        if value is None or value == "":
            unlabelled += 1
            continue
        sides.setdefault(str(name), ([], []))[0 if str(value) == prefer else 1].append(i)
    account = Account(len(sides), unit="groups")
    found: list[tuple[int, int]] = []
    groups_used = 0
    for name, (better, others) in sides.items():
        if not better or not others:
            account.drop(f"without both {prefer!r} and another label", numbers[(better or others)[0]], name)
            continue
        groups_used += 1
        order = stream(seed, "pairs", name)
        better, others = list(order.permutation(better)), list(order.permutation(others))
        wanted = per_group if group else max(per_group, min(len(better), len(others)))
        count = min(wanted, max(len(better), len(others)))
        found += [(int(better[i % len(better)]), int(others[i % len(others)])) for i in range(count)]
    account.close(groups_used)
    account.extra = f"; {len(found)} pairs" + (f"; {unlabelled} rows without a label left out" if unlabelled else "")
    return found, account


def pair_examples(
    rows: Dataset,
    tokenizer: Tokenizer,
    *,
    chosen: str,
    rejected: str,
    prompt: str | None,
    max_tokens: int,
    margin: str | None = None,
) -> tuple[Pairs, Account]:
    """Pairs from columns, an EOS behind each text, the prompt in front of both.

    What is no text or no number is dropped, and pairs too long, with two equal sides, or with nothing to learn in one.
    """
    if not prompt:
        _refuse_sources(tokenizer, "pairs of whole texts", "set data.prompt")
    account = Account(len(rows), unit="pairs")
    made = Pairs()
    starts = rows[prompt] if prompt else [""] * len(rows)
    margins = rows[margin] if margin else [0.0] * len(rows)
    columns = (row_numbers(rows), starts, rows[chosen], rows[rejected], margins)
    for i, start, better, other, by in zip(*columns, strict=True):
        number = _number(by)
        if not all(isinstance(text, str) for text in (start or "", better, other)):
            account.drop("that are no text", i)
            continue
        if number is None:
            account.drop(f"whose {margin} is no number", i)
            continue
        first = tokenizer.encode_prompt(start or "") if prompt else []
        if tokenizer.for_sources and not first:
            account.drop("with an empty source", i)
            continue
        one, two = ([*first, *tokenizer.encode(t, special=not prompt), tokenizer.eos_id] for t in (better, other))
        _add_pair(made, account, i, Pair(one, two, len(first), number), max_tokens)
    return made, account.close(len(made))


def label_pairs(
    found: Sequence[tuple[int, int]], rows: Dataset, tokenizer: Tokenizer, *, text: str, max_tokens: int
) -> tuple[Pairs, Account]:
    """Pairs of whole texts from (better row, other row), an EOS behind each; dropped as by `pair_examples`."""
    _refuse_sources(tokenizer, "pairs of whole texts", "set data.chosen, data.rejected and data.prompt")
    account = Account(len(found), unit="pairs")
    texts, tokens, numbers = rows[text], Tokens(), row_numbers(rows)
    place = {row: n for n, row in enumerate(sorted({r for pair in found for r in pair}))}
    for row in place:
        tokens.append([*tokenizer.encode(texts[row]), tokenizer.eos_id])
    made = Pairs()
    for better, other in found:
        _add_pair(made, account, numbers[better], Pair(tokens[place[better]], tokens[place[other]]), max_tokens)
    return made, account.close(len(made))


def prompts(
    rows: Dataset,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    prompt: str | None = None,
    text: str | None = None,
    words: Words | None = None,
    messages: str | None = None,
    seed: int = 0,
) -> tuple[list[Prompt], Account]:
    """Prompts from a column, from the first words of a text (as many as a keyed draw says), or from conversations.

    A conversation is cut before its last assistant turn. What is empty or longer than max_tokens is dropped.
    """
    account = Account(len(rows), unit="prompts")
    made = []
    for i, row in zip(row_numbers(rows), rows, strict=True):
        if prompt and not isinstance(row[prompt], str):
            account.drop("without a prompt" if row[prompt] is None else "that are no text", i)
            continue
        if prompt:
            shown = row[prompt]
        elif text:
            count = word_count(row[text], words, seed)
            shown, rest = opened(row[text], count)
            if not rest:
                account.drop(f"with no more than {count} words", i, row[text])
                continue
        elif not is_chat(row[messages]):
            account.drop("without turns of role and content", i)
            continue
        else:
            turns = row[messages]
            turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            shown = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        ids = tokenizer.chat(turns) if messages and not prompt and not text else tokenizer.encode_prompt(shown)
        if not ids:
            account.drop("with an empty source" if tokenizer.for_sources else "empty", i)
        elif len(ids) > max_tokens:
            account.drop(f"longer than {max_tokens} tokens", i, shown)
        else:
            made.append(Prompt(ids, shown, row, i))
    return made, account.close(len(made))


def _refuse_sources(tokenizer: Tokenizer, what: str, remedy: str) -> None:
    if tokenizer.for_sources:
        raise DataError(f"an encoder-decoder cannot learn from {what}: there is nothing for its encoder", remedy)


def _fitting(rows: Dataset, made: Iterable[Learned | str], max_tokens: int) -> tuple[Examples, Account]:
    """The examples among what was made of each row: ids and what is learned of them, or why there is nothing."""
    account = Account(len(rows), unit="examples")
    kept = Examples()
    for n, (number, found) in enumerate(zip(row_numbers(rows), made, strict=True)):
        if isinstance(found, str):
            reason = found
        elif len(found[0]) > max_tokens:
            reason = f"longer than {max_tokens} tokens"
        elif len(found[0]) < 2 or not any(found[1][1:]):
            reason = "with nothing to learn"
        else:
            kept.append(Example(*found, number))
            continue
        account.drop(reason, number, "" if reason in account.dropped else rows[n])
    return kept, account.close(len(kept))


def _add_pair(made: Pairs, account: Account, row: int, pair: Pair, max_tokens: int) -> None:
    sides = (pair.chosen, pair.rejected)
    if pair.chosen == pair.rejected:
        account.drop("with two equal sides", row)
    elif max(map(len, sides)) > max_tokens:
        account.drop(f"longer than {max_tokens} tokens", row)
    elif min(map(len, sides)) <= max(pair.prompt_length, 1):  # a first token is predicted by nothing
        account.drop("with nothing to learn in one side", row)
    else:
        made.append(pair)


def _number(value: Any) -> float | None:
    """A finite number, also one written as text, as in a CSV file; None for anything else."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def is_chat(turns: Any) -> bool:
    """Whether a value is a conversation: turns of a role and a content."""
    return (
        isinstance(turns, list | tuple)
        and bool(turns)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        )
    )
