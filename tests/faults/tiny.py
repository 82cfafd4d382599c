"""The fixtures of tests/conftest.py for programs that pytest does not run."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import make_rows, save_tiny_model, save_tokenizer
from upslope.text.tokenizer import Tokenizer


def tiny_files(work: Path) -> tuple[Path, list[dict[str, str]]]:
    """A tiny model with its tokenizer under a folder, and rows for it."""
    (work / "tokenizer").mkdir(parents=True)
    (work / "model").mkdir()
    save_tokenizer(work / "tokenizer")
    save_tiny_model(work / "model", Tokenizer.load(work / "tokenizer"))
    return work / "model", make_rows()
