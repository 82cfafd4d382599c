"""From rows to what a stage trains on, with an account of everything that was dropped.

Every function returns (what was made, Account) and raises DataError, naming the chief reason, when nothing is left.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from upslope.algo.random import stream
from upslope.errors import DataError
from upslope.text.examples import Example, Examples, Pair, Pairs, Tokens
from upslope.text.tokenizer import Tokenizer


@dataclass
class Account:
    """How many were read and kept, and for each reason how many were dropped, with the first one's row number."""

    read: int
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    unit: str = "rows"
    extra: str = ""

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, row)

    def close(self, kept: int) -> Account:
        """Set what was kept. Raises DataError when it is nothing."""
        self.kept = kept
        if not kept:
            reason = max(self.dropped, key=lambda r: self.dropped[r]) if self.dropped else "there were none"
            count = f" ({self.dropped[reason]} of {self.read})" if self.dropped else ""
            raise DataError(
                f"no {self.unit} left of {self.read}: {reason}{count}", "loosen that limit in [data], or add rows"
            )
        return self

    def __str__(self) -> str:
        parts = [f"{count} {reason} (first: row {self.first[reason]})" for reason, count in self.dropped.items()]
        tail = f"; dropped: {', '.join(parts)}" if parts else "; nothing dropped"
        return f"{self.kept} {self.unit} of {self.read}{tail}{self.extra}"


@dataclass(frozen=True)
class Prompt:
    """What a completion starts from: ids, the text they stand for, and the whole row for rewards to read."""

    ids: list[int]
    text: str
    row: dict[str, Any]


def clean(
    rows: Dataset,
    *,
    text: str | None,
    min_chars: int = 1,
    max_chars: int = 100_000,
    keep: Mapping[str, Sequence[str]] | None = None,
    dedupe: bool = True,
) -> tuple[Dataset, Account]:
    """Keep the rows whose columns have the wanted values and whose text is there, fits, and is no repeat.

    Texts that differ only in white space or case are repeats; the first stays.
    """
    account = Account(len(rows))
    chosen, seen = [], set()
    wanted = {column: ({str(v) for v in values}, rows[column]) for column, values in (keep or {}).items()}
    texts = rows[text] if text else [None] * len(rows)
    for i, value in enumerate(texts):
        if any(str(column[i]) not in values for values, column in wanted.values()):
            account.drop("of another kind", i)
        elif text and not (isinstance(value, str) and value.strip()):
            account.drop("without text", i)
        elif text and not min_chars <= len(value) <= max_chars:
            account.drop(f"outside {min_chars} to {max_chars} characters", i)
        elif text and dedupe and (key := _digest(_folded(value))) in seen:
            account.drop("repeated", i)
        else:
            if text and dedupe:
                seen.add(key)
            chosen.append(i)
    account.close(len(chosen))
    return rows.select(chosen), account


def split(
    rows: Dataset, *, group: str | None, fractions: Mapping[str, float], seed: int, same: str | None = None
) -> tuple[dict[str, Dataset], Account]:
    """Split rows by group, so that no group is on two sides; without groups, so that no row's equal is.

    Without groups, `same` names the column (a text, a prompt) whose equals stay together whatever else a row holds.
    Where a group goes depends on (seed, group) alone: more rows never move it. Raises DataError for an empty side.
    """
    sides: dict[str, list[int]] = {name: [] for name in fractions}
    groups: dict[str, set[bytes]] = {name: set() for name in fractions}
    keys: Iterable[Any]
    if group:
        keys = rows[group]
    elif same:
        keys = (_folded(str(value)) for value in rows[same])
    else:
        keys = (_folded(str(sorted(row.items(), key=str))) for row in rows)
    for i, key in enumerate(keys):
        place, bound = _place(seed, str(key)), 0.0
        side = next(reversed(list(fractions)))
        for name, fraction in fractions.items():
            bound += fraction
            if place < bound:
                side = name
                break
        sides[side].append(i)
        groups[side].add(_digest(str(key)))
    for name, fraction in fractions.items():
        if fraction > 0 and not sides[name]:
            raise DataError(
                f"the {name} side of the split is empty: {sum(map(len, groups.values()))} groups in all", "add rows"
            )
    told = ", ".join(f"{n} {len(r)}" + (f" ({len(groups[n])} groups)" if group else "") for n, r in sides.items())
    account = Account(len(rows), extra=f"; {told}").close(len(rows))
    return {name: rows.select(indices) for name, indices in sides.items()}, account


def text_examples(rows: Dataset, tokenizer: Tokenizer, *, text: str, max_tokens: int) -> tuple[Examples, Account]:
    """Whole texts, an EOS behind each; every token is learned."""
    made = ([*tokenizer.encode(value), tokenizer.eos_id] for value in rows[text])
    return _fitting(rows, ((ids, [True] * len(ids)) for ids in made), max_tokens)


def completion_examples(
    rows: Dataset, tokenizer: Tokenizer, *, prompt: str, completion: str, max_tokens: int
) -> tuple[Examples, Account]:
    """Prompt and completion; the completion and its EOS are learned."""

    def made() -> Iterator[tuple[list[int], list[bool]]]:
        for start, end in zip(rows[prompt], rows[completion], strict=True):
            first = tokenizer.encode(start or "")
            second = [*tokenizer.encode(end or "", special=False), tokenizer.eos_id]
            yield [*first, *second], [False] * len(first) + [True] * len(second)

    return _fitting(rows, made(), max_tokens)


def chat_examples(rows: Dataset, tokenizer: Tokenizer, *, messages: str, max_tokens: int) -> tuple[Examples, Account]:
    """Conversations; the assistant's turns and their ends are learned."""
    made = (tokenizer.chat_example(turns) if _is_chat(turns) else ([], []) for turns in rows[messages])
    return _fitting(rows, made, max_tokens)


def pairs(
    rows: Dataset, *, text: str, label: str, prefer: str, group: str | None, per_group: int, seed: int
) -> tuple[list[tuple[int, int]], Account]:
    """(better row, other row) pairs within each group: rows labelled `prefer` above the others, in a keyed order.

    Each row is used as few times as `per_group` allows: the shorter side is gone through again when it is used up.
    Without groups all rows are one, and every row of the shorter side gets a pair. Rows without a label get none.
    """
    sides: dict[str, tuple[list[int], list[int]]] = {}
    labels, groups = rows[label], rows[group] if group else [""] * len(rows)
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
            account.drop(f"without both {prefer!r} and another label", (better or others)[0])
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
    account = Account(len(rows), unit="pairs")
    made = Pairs()
    starts = rows[prompt] if prompt else [""] * len(rows)
    margins = rows[margin] if margin else [0.0] * len(rows)
    for i, (start, better, other, by) in enumerate(zip(starts, rows[chosen], rows[rejected], margins, strict=True)):
        number = _number(by)
        if not all(isinstance(text, str) for text in (start or "", better, other)):
            account.drop("that are no text", i)
            continue
        if number is None:
            account.drop(f"whose {margin} is no number", i)
            continue
        first = tokenizer.encode(start or "") if prompt else []
        one, two = ([*first, *tokenizer.encode(t, special=not prompt), tokenizer.eos_id] for t in (better, other))
        _add_pair(made, account, i, Pair(one, two, len(first), number), max_tokens)
    return made, account.close(len(made))


def label_pairs(
    found: Sequence[tuple[int, int]], rows: Dataset, tokenizer: Tokenizer, *, text: str, max_tokens: int
) -> tuple[Pairs, Account]:
    """Pairs of whole texts from (better row, other row), an EOS behind each; dropped as by `pair_examples`."""
    account = Account(len(found), unit="pairs")
    texts, tokens = rows[text], Tokens()
    place = {row: n for n, row in enumerate(sorted({r for pair in found for r in pair}))}
    for row in place:
        tokens.append([*tokenizer.encode(texts[row]), tokenizer.eos_id])
    made = Pairs()
    for better, other in found:
        _add_pair(made, account, better, Pair(tokens[place[better]], tokens[place[other]]), max_tokens)
    return made, account.close(len(made))


def prompts(
    rows: Dataset,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    prompt: str | None = None,
    text: str | None = None,
    words: int | tuple[int, int] | None = None,
    messages: str | None = None,
    seed: int = 0,
) -> tuple[list[Prompt], Account]:
    """Prompts from a column, from the first words of a text (as many as a keyed draw says), or from conversations.

    A conversation is cut before its last assistant turn. What is empty or longer than max_tokens is dropped.
    """
    account = Account(len(rows), unit="prompts")
    made = []
    low, high = (words, words) if isinstance(words, int) else (words or (0, 0))
    for i, row in enumerate(rows):
        if prompt and not isinstance(row[prompt] or "", str):
            account.drop("that are no text", i)
            continue
        if prompt:
            shown = row[prompt] or ""
        elif text:
            count = int(stream(seed, "words", row[text]).integers(low, high + 1))
            parts = row[text].split()
            if len(parts) <= count:
                account.drop(f"with no more than {count} words", i)
                continue
            shown = " ".join(parts[:count])
        elif not _is_chat(row[messages]):
            account.drop("without turns of role and content", i)
            continue
        else:
            turns = row[messages]
            turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            shown = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        ids = tokenizer.chat(turns) if messages and not prompt and not text else tokenizer.encode(shown)
        if not ids:
            account.drop("empty", i)
        elif len(ids) > max_tokens:
            account.drop(f"longer than {max_tokens} tokens", i)
        else:
            made.append(Prompt(ids, shown, row))
    return made, account.close(len(made))


def _fitting(rows: Dataset, made: Iterable[tuple[list[int], list[bool]]], max_tokens: int) -> tuple[Examples, Account]:
    account = Account(len(rows), unit="examples")
    kept = Examples()
    for i, (ids, learned) in enumerate(made):
        if len(ids) > max_tokens:
            account.drop(f"longer than {max_tokens} tokens", i)
        elif not ids:
            account.drop("empty or malformed", i)
        elif len(ids) < 2 or not any(learned[1:]):
            account.drop("with nothing to learn", i)
        else:
            kept.append(Example(ids, learned, i))
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


def _is_chat(turns: Any) -> bool:
    """Whether a value is a conversation: turns of a role and a content."""
    return bool(turns) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )


def _digest(text: str) -> bytes:
    """What stands for a text in a set of many: 16 bytes, however long it is."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _place(seed: int, key: str) -> float:
    """A number in [0, 1) from the seed and a key."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
