"""Labels as what a model writes: an encoder's one action is the number of a label, whose text is its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from upslope.errors import DataError
from upslope.text.cleaning import Account, row_numbers
from upslope.text.examples import Example, Examples
from upslope.text.tokenizer import Tokenizer


class LabelTokenizer(Tokenizer):
    """Reads prompts as its tokenizer does, and writes labels: every one of them ends what is written."""

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        super().__init__(tokenizer.inner, tokenizer.source, for_sources=tokenizer.for_sources)
        self.reader = tokenizer
        self.labels = tuple(labels)
        self.vocab_size = len(self.labels)
        self.eos_id = tuple(range(len(self.labels)))  # type: ignore[assignment] # the engine takes several

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return " ".join(self.labels[i] for i in ids)

    def pieces(self, ids: Sequence[int], *, skip_special: bool = False) -> list[str]:
        return [self.labels[i] for i in ids]

    def source_pieces(self, ids: Sequence[int]) -> list[str]:
        """The tokens of a prompt as text, which are not labels."""
        return self.reader.pieces(ids)

    def save(self, folder: Path) -> None:
        """Write the tokenizer of its prompts; the labels stand in the model's configuration."""
        self.inner.save_pretrained(str(folder))


def labels_of(rows: Dataset, classes: str) -> tuple[str, ...]:
    """The labels of the training side, sorted. Raises DataError for fewer than two, or one that is a list."""
    values = rows[classes]
    for row, value in zip(row_numbers(rows), values, strict=True):
        if isinstance(value, list | tuple | dict):
            raise DataError(
                f"row {row} has {value!r:.80} in column {classes!r}, and a class is one label",
                "name a column of texts or numbers in data.classes",
            )
    labels = sorted({str(value) for value in values if _is_there(value)})
    if len(labels) < 2:
        raise DataError(
            f"the training side has {len(labels)} labels in column {classes!r}: nothing to choose",
            "name another column",
        )
    return tuple(labels)


def with_known_labels(rows: Dataset, labels: Sequence[str], classes: str) -> tuple[Dataset, Account]:
    """The rows of another side whose labels the training side has, too, or that have none."""
    account, known, kept = Account(len(rows)), set(labels), []
    for n, (row, value) in enumerate(zip(row_numbers(rows), rows[classes], strict=True)):
        if _is_there(value) and str(value) not in known:
            account.drop(f"of label {str(value)!r:.80}, which the training side lacks", row)
        else:
            kept.append(n)
    return rows.select(kept), account.close(len(kept))


def class_examples(
    rows: Dataset, tokenizer: LabelTokenizer, *, text: str, classes: str, max_tokens: int
) -> tuple[Examples, Account]:
    """A text as a source, and its label as the one token that is learned."""
    account = Account(len(rows), unit="examples")
    number = {label: n for n, label in enumerate(tokenizer.labels)}
    made = Examples()
    for i, value, label in zip(row_numbers(rows), rows[text], rows[classes], strict=True):
        ids = tokenizer.encode_prompt(value) if isinstance(value, str) else []
        if not _is_there(label):
            account.drop("without a label", i, value)
        elif not ids:
            account.drop("with an empty source", i)
        elif len(ids) > max_tokens:
            account.drop(f"longer than {max_tokens} tokens", i, value)
        else:
            made.append(Example([*ids, number[str(label)]], [False] * len(ids) + [True], i))
    return made, account.close(len(made))


def _is_there(value: object) -> bool:
    return value is not None and value != ""
