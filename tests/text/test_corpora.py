"""Corpora from small made-up packages: what is taken, what is left, and that the same package gives the same rows."""

import pytest

from upslope.errors import DataError
from upslope.text import corpora
from upslope.text.rows import load_rows

FILES = {
    corpora.CODESPELL: "teh->the\nhsi->his\ncatt->cat\ndgo->dog\nfoo->bar, baz,\nLondno->London\n",
    f"{corpora.WORDNET}/data.noun": (
        "  1 This software\n"
        '00000001 05 n 02 cat 0 true_cat 0 000 | a feline mammal; "the cat sat there"; "cats"  \n'
        '00000002 05 n 01 hood 0 000 | a (slang) thing; "they grew up in the hood"; "This was fun"  \n'
        "00000003 05 n 01 dog 0 000 | a canine mammal  \n"
    ),
    f"{corpora.WORDNET}/data.verb": '00000001 30 v 01 chase 0 000 | go after; "a dog chased it"  \n',
    f"{corpora.WORDNET}/data.adj": "",
    f"{corpora.WORDNET}/data.adv": "",
    f"{corpora.WORDNET}/index.sense": (
        "cat%1:05:00:: 00000001 1 4\nfeline%1:05:00:: 00000001 1 9\ntrue_cat%1:05:00:: 00000001 1 7\n"
        "hood%1:05:00:: 00000002 1 0\ndog%1:05:00:: 00000003 1 1\nchase%2:30:00:: 00000001 1 2\n"
    ),
    corpora.DING: (
        "# a comment\nHund {m} :: dog\n"
        "Der Hund schläft heute. | Die Katze auch nicht. :: The dog sleeps today. | Nor does the cat.\n"
        "Er hat etw. gesagt. :: He said sth. then.\nWie geht es? :: How are things? | What's up?\nJa :: Yes.\n"
    ),
}


@pytest.fixture(autouse=True)
def packages(tmp_path, monkeypatch):
    def resolve(source):
        path = tmp_path / source.replace("/", "_")
        path.write_text(FILES[source], encoding="utf-8")
        return path

    monkeypatch.setattr(corpora, "resolve", resolve)


def test_spelling_puts_one_real_misspelling_into_each_sentence():
    rows = corpora.corpus("spelling")
    assert rows == corpora.corpus("spelling")
    assert [r["right"] for r in rows] == ["the cat sat there", "they grew up in the hood", "a dog chased it"]
    for row in rows:
        here, there = row["wrong"].split(), row["right"].split()
        changed = [(a, b) for a, b in zip(here, there, strict=True) if a != b]
        assert changed == [(row["typo"], row["word"])]
        assert row["typo"] in ("teh", "catt", "dgo")


def test_words_are_those_in_use_the_most_used_first():
    found = [(r["definition"], r["word"], r["words"], r["kind"], r["family"]) for r in corpora.corpus("words")]
    assert found == [
        ("a feline mammal", "feline", ["feline", "cat"], "noun", "felin"),
        ("a canine mammal", "dog", ["dog"], "noun", "dog"),
        ("go after", "chase", ["chase"], "verb", "chas"),
    ]


def test_a_words_kin_are_one_family_and_so_on_one_side_of_a_split(monkeypatch):
    kin = ["receive", "receiver", "receiving", "received"]
    others = ["necessary", "necessarily", "happy", "happiness"]
    texts = "; ".join(f'"we saw {word} number {n}"' for word in kin + others for n in range(5))
    monkeypatch.setitem(FILES, f"{corpora.WORDNET}/data.verb", f"00000001 30 v 01 chase 0 000 | go; {texts}  \n")
    monkeypatch.setitem(FILES, corpora.CODESPELL, "".join(f"{word}x->{word}\n" for word in kin + others))
    rows = [row for row in corpora.corpus("spelling") if "number" in row["right"]]
    families = {row["word"]: row["family"] for row in rows}
    assert len(families) == 8 and len(set(families.values())) == 3 and len({families[word] for word in kin}) == 1


def test_translations_are_whole_sentences_one_to_one():
    assert corpora.corpus("german-english") == [
        {"german": "Der Hund schläft heute.", "english": "The dog sleeps today."},
        {"german": "Die Katze auch nicht.", "english": "Nor does the cat."},
        {"german": "Wie geht es?", "english": "How are things?"},
    ]


def test_a_corpus_is_rows_like_any_other_and_a_wrong_name_is_told():
    assert load_rows("corpus:words", limit=2)["word"][:] == ["feline", "dog"]
    with pytest.raises(DataError, match="no corpus 'speling'; there is spelling"):
        load_rows("corpus:speling")
