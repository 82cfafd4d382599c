"""Near duplicates against the resemblance itself, computed for every pair."""

import numpy as np
from datasets import Dataset

from upslope.text.cleaning import split
from upslope.text.near import near_duplicates, resemblance, without_near


def make_texts(count=60, seed=0):
    """Texts of random words, each followed by copies with one, three or many letters changed."""
    draw = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    texts = []
    for _ in range(count):
        text = "".join(draw.choice(list(letters), size=120))
        texts.append(text)
        for changes in (1, 3, 30):
            copy = list(text)
            for place in draw.integers(0, len(copy), size=changes):
                copy[place] = "#"
            texts.append("".join(copy))
    return texts


def test_resemblance_by_hand():
    assert resemblance("abcdef", "abcdef") == 1.0
    assert resemblance("abcdef", "abcdeg") == 1 / 3  # abcde, bcdef against abcde, bcdeg
    assert resemblance("  Abc\nDEF ", "abc def") == 1.0 and resemblance("", "") == 1.0
    assert resemblance("abc", "abd") == 0.0


def test_what_stays_has_no_near_pair_and_what_goes_is_near_what_stays():
    texts = make_texts()
    found = near_duplicates(texts, 0.7)
    kept = [i for i, near in enumerate(found) if near is None]
    assert 100 < len(kept) < 200
    for i, near in enumerate(found):
        if near is not None:
            assert near < i and near in kept and resemblance(texts[i], texts[near]) >= 0.7
    near_pairs = [(a, b) for n, a in enumerate(kept) for b in kept[:n] if resemblance(texts[a], texts[b]) >= 0.7]
    assert len(near_pairs) <= 1  # what MinHash may overlook: about one candidate in a hundred at the threshold itself


def test_a_copy_with_one_letter_changed_stands_on_no_other_side_of_a_split():
    texts = make_texts(40)
    rows = Dataset.from_dict({"text": texts, "row_number": [7 * n for n in range(len(texts))]})
    kept, account = without_near(rows, "text", 0.8)
    assert account.kept + sum(account.dropped.values()) == len(texts)
    (reason,) = account.dropped
    assert account.first[reason] == 7 and "is near row 0:" in account.shown[reason]
    sides, _ = split(kept, group=None, same="text", fractions={"train": 0.5, "test": 0.5}, seed=0)
    worst = max(resemblance(a, b) for a in sides["train"]["text"] for b in sides["test"]["text"])
    before, _ = split(rows, group=None, same="text", fractions={"train": 0.5, "test": 0.5}, seed=0)
    assert worst < 0.8 < max(resemblance(a, b) for a in before["train"]["text"] for b in before["test"]["text"])
