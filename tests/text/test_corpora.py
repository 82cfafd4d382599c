"""Corpora from small made-up packages: what is taken, what is left, and that the same package gives the same rows."""

import pytest

from tests.text.packages import FILES, HEAD, SENSES, put
from upslope.errors import DataError
from upslope.text import corpora, labelled
from upslope.text.rows import load_rows


@pytest.fixture(autouse=True)
def packages(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    put(FILES)


def test_spelling_puts_one_real_misspelling_into_each_sentence():
    rows = corpora.corpus("spelling")
    assert rows == corpora.corpus("spelling")
    assert [r["right"] for r in rows] == ["the cat sat there", "they grew up in the hood", "a dog chased it"]
    for row in rows:
        here, there = row["wrong"].split(), row["right"].split()
        changed = [(a, b) for a, b in zip(here, there, strict=True) if a != b]
        assert changed == [(row["typo"], row["word"])]
        assert row["typo"] in ("teh", "catt", "dgo")


def test_a_word_is_misspelt_no_more_often_than_the_others_of_its_sentences(monkeypatch):
    examples = ["the cat sat there", "the dog ran", "the cat slept", "all the rest of it", "to the very end"]
    glosses = "".join(f'{n:08} 05 n 01 x 0 000 | a; "{text}"  \n' for n, text in enumerate(examples))
    put({f"{corpora.WORDNET}/data.noun": glosses, f"{corpora.WORDNET}/data.verb": ""})
    assert [row["word"] for row in corpora.corpus("spelling")] == ["the", "dog", "cat", "the", "the"]
    monkeypatch.setattr(corpora, "MISSPELT", 2)
    assert [row["word"] for row in corpora.corpus("spelling")] == ["the", "dog", "cat", "the"]


def test_misspellings_are_there_without_sentences_too_those_of_one_correction_in_lower_case():
    assert corpora.corpus("misspellings") == [
        {"typo": "teh", "word": "the", "family": "the"},
        {"typo": "hsi", "word": "his", "family": "his"},
        {"typo": "catt", "word": "cat", "family": "cat"},
        {"typo": "dgo", "word": "dog", "family": "dog"},
    ]


def test_words_are_those_in_use_the_most_used_first():
    found = [(r["definition"], r["word"], r["words"], r["kind"], r["family"]) for r in corpora.corpus("words")]
    assert found == [
        ("a feline mammal", "feline", ["feline", "cat"], "noun", "felin"),
        ("a canine mammal", "dog", ["dog"], "noun", "dog"),
        ("go after", "chase", ["chase"], "verb", "chas"),
    ]


def test_a_words_kin_are_one_family_and_so_on_one_side_of_a_split():
    kin = ["receive", "receiver", "receiving", "received"]
    others = ["necessary", "necessarily", "happy", "happiness"]
    texts = "; ".join(f'"we saw {word} number {n}"' for word in kin + others for n in range(5))
    verbs = f"00000001 30 v 01 chase 0 000 | go; {texts}  \n"
    typos = "".join(f"{word}x->{word}\n" for word in kin + others)
    put({f"{corpora.WORDNET}/data.verb": verbs, corpora.CODESPELL: typos})
    rows = [row for row in corpora.corpus("spelling") if "number" in row["right"]]
    families = {row["word"]: row["family"] for row in rows}
    assert len(families) == 8 and len(set(families.values())) == 3 and len({families[word] for word in kin}) == 1


def test_translations_are_whole_sentences_one_to_one():
    assert corpora.corpus("german-english") == [
        {"german": "Der Hund schläft heute.", "english": "The dog sleeps today."},
        {"german": "Die Katze auch nicht.", "english": "Nor does the cat."},
        {"german": "Wie geht es?", "english": "How are things?"},
    ]


def test_senses_are_sentences_and_six_definitions_the_words_own_meanings_among_them():
    put(SENSES)
    (row,) = corpora.corpus("senses")
    assert (row["sentence"], row["word"], row["family"]) == ("they sat on the bank", "bank", "bank")
    assert len(set(row["passages"])) == 6 and row["passages"][row["right"]] == "land beside water"
    assert {"a house of money", "lean to a side"} < set(row["passages"])
    assert [row] == corpora.corpus("senses")


def test_too_few_meanings_to_choose_from_are_told():
    put(SENSES)
    few = [line for line in SENSES[f"{corpora.WORDNET}/data.noun"].splitlines() if "definition" not in line]
    put({f"{corpora.WORDNET}/data.noun": "\n".join(few)})
    with pytest.raises(DataError, match=r"corpus:senses .* 3 definitions of the kind noun are too few"):
        corpora.corpus("senses")


def test_mail_is_its_subject_and_its_first_lines_and_no_more_of_its_header():
    assert corpora.corpus("mail") == [
        {"text": "Lunch. At one? > Where?", "label": "ham", "thread": "lunch"},
        {"text": "Win & win", "label": "spam", "thread": "00002"},
        {"text": "Lunch", "label": "spam", "thread": "lunch"},
    ]


def test_the_newswire_is_the_beginning_of_each_story():
    first, second = corpora.corpus("newswire")
    assert first == {
        "text": f"fab industries inc net{' shr' * 36}",
        "topic": "earn",
        "source": "fab industries inc",
    }
    assert second == {"text": "ussr buys", "topic": "grain", "source": "ussr buys"}


def test_verses_stand_side_by_side_without_their_marks():
    rows = corpora.corpus("bible")
    assert rows[0] == {
        "king_james": "In the beginning God made.",
        "modern": "“In the beginning, God made. All & more.”",
        "book": "Gen",
        "chapter": 1,
        "verse": 1,
    }
    assert [(r["verse"], r["king_james"], r["modern"]) for r in rows[1:3]] == [
        (2, "And it was so.", ""),
        (3, "", "A verse of one only."),
    ]


def test_replies_follow_what_was_said_and_a_turn_is_all_that_one_says():
    assert corpora.corpus("dialogue") == [
        {"before": "", "said": "Hi there", "reply": "Hello.", "conversation": "a", "about": "What if?"},
        {"before": "Hi there", "said": "Hello.", "reply": "How are you?", "conversation": "a", "about": "What if?"},
        {"before": "", "said": "Pizza?", "reply": "Yes.", "conversation": "c", "about": ""},
    ]


VERSES, MAIL = f"{corpora.KING_JAMES}/ot", f"{labelled.MAIL}/spam-2/00002.json"
DAMAGED = [
    *(("bible", f"{VERSES}.{end}", FILES[f"{VERSES}.{end}"][:-3]) for end in ("bzs", "bzv", "bzz")),
    *(
        ("dialogue", corpora.CHATS, text)
        for text in ("{", "[1]", '{"a": {"messages": [[{}]]}}', '{"a": {"messages": 1}}')
    ),
    *(("mail", MAIL, text) for text in ("{", "[]", '{"text": 1}', b"\xff")),
    ("newswire", labelled.NEWSWIRE.format(side="test"), HEAD.encode() + b"grain\t\xff\n"),
    ("words", f"{corpora.WORDNET}/index.sense", "cat%1:05:00:: 00000001\n"),
    ("senses", f"{corpora.WORDNET}/data.verb", "00000001 30 v xx bank 0 000 | lean\n"),
]


@pytest.mark.parametrize(("name", "source", "data"), DAMAGED, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(DAMAGED)])
def test_a_damaged_package_is_told(name, source, data):
    put({source: data})
    with pytest.raises(
        DataError, match=rf"corpus:{name} cannot be made of what its packages hold: .*; remove .*upslope"
    ):
        corpora.corpus(name)


def test_a_corpus_is_rows_like_any_other_and_a_wrong_name_is_told():
    assert load_rows("corpus:words", limit=2)["word"][:] == ["feline", "dog"]
    with pytest.raises(DataError, match="no corpus 'speling'; there is spelling"):
        load_rows("corpus:speling")
