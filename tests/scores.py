"""Rewards to train with. They stand apart, so that a worker process imports no torch to find them."""


def count_vowels(prompts, completions, rows):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def count_lower(prompts, completions, rows):
    return [float(sum(c.islower() for c in text)) for text in completions]


def length(prompts, completions, rows):
    return [float(len(text)) for text in completions]
