"""Rewards to train with. They stand apart, so that a worker process imports no torch to find them."""


def count_vowels(prompts, completions, rows):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def count_lower(prompts, completions, rows):
    return [float(sum(c.islower() for c in text)) for text in completions]


def length(prompts, completions, rows):
    return [float(len(text)) for text in completions]


def same_for_all(prompts, completions, rows):
    return [1.0] * len(completions)


def fails_at_times(prompts, completions, rows):
    return [None if "e" in c else 1.0 * len(c) for c in completions]


def fails_sometimes(prompts, completions, rows):
    return [None if sum(map(ord, text)) % 3 == 0 else float(len(text)) for text in completions]


def right(prompts, completions, rows):
    return [float(c == row["label"]) for c, row in zip(completions, rows, strict=True)]


def plain_start(prompts, completions, rows):
    return [float(bool(c) and c[0].isascii()) for c in completions]


def shouts(prompts, completions, rows):
    return [float(c.isupper()) for c in completions]


def pays_for_length(prompts, completions, rows):
    """A reward that any longer text earns: the task's metric falls as it is learned."""
    return [float(len(c)) for c in completions]


def bad_half(prompts, completions, rows):
    return [None if i % 2 else 1.0 for i in range(len(completions))]


def raises(prompts, completions, rows):
    raise KeyError("missing")
