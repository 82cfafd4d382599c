"""The first words of a text as a prompt, and the rest of it."""

from __future__ import annotations

from upslope.algo.random import stream

Words = int | tuple[int, int]  # so many, or between two bounds


def word_count(text: str, words: Words | None, seed: int) -> int:
    """How many first words of a text are its prompt: a keyed draw between the two bounds."""
    low, high = (words, words) if isinstance(words, int) else (words or (0, 0))
    return int(stream(seed, "words", text).integers(low, high + 1))


def opened(text: str, count: int) -> tuple[str, str]:
    """(so many first words of a text, the rest with the space in front)."""
    parts = text.split()
    return " ".join(parts[:count]), "".join(f" {word}" for word in parts[count:])
