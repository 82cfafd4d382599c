"""Corpora from small made-up packages: what is taken, what is left, and that the same package gives the same rows."""

import json
import struct
import zlib

import pytest

from upslope.errors import DataError
from upslope.text import corpora, labelled, wordnet
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


def module(*entries):
    """The three files of a testament in one block: what index, places and packed text say of these entries."""
    plain, places = b"", b""
    for text in entries:
        places += struct.pack("<IIH", 0, len(plain), len(text.encode()))
        plain += text.encode()
    packed = zlib.compress(plain)
    return {"bzs": struct.pack("<III", 0, len(packed), len(plain)), "bzv": places, "bzz": packed}


GENESIS = '<chapter n="1" osisID="Gen.1" sID="Gen.1"/>'
MODULES = {
    corpora.KING_JAMES: module(
        "",
        '<div type="book"/>',
        GENESIS,
        'In the <w lemma="H7225">beginning</w> God made.',
        "<q>¶ And</q> it was so.",
        "",
    ),
    corpora.MODERN: module(
        '<div type="front"/>A preface.',
        GENESIS,
        "<title>Psalm</title>“In the beginning, God<note>in Hebrew</note>made.<l/>All &amp; more.<note>x</note>”",
        '<chapter eID="Gen.1"/>An appendix.',
        "A verse of one only.",
    ),
}
FILES |= {
    f"{name}/{side}.{end}": data
    for name, files in MODULES.items()
    for side in ("ot", "nt")
    for end, data in files.items()
}
TURNS = [["Hi", "there"], ["Hello."], ["How  are you?"]]
CHATS = {"a": {"messages": [[{"text": text} for text in turn] for turn in TURNS], "prompt": "What if?"}}
CHATS["b"] = {"messages": [[{"text": "nobody answers"}]], "prompt": "Why?"}
FILES[corpora.CHATS] = json.dumps(CHATS)


@pytest.fixture(autouse=True)
def packages(tmp_path, monkeypatch):
    def resolve(source):
        path = tmp_path / source.replace("/", "_")
        data = FILES[source]
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    monkeypatch.setattr(corpora, "resolve", resolve)
    monkeypatch.setattr(wordnet, "resolve", resolve)


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


def test_senses_are_sentences_and_six_definitions_the_words_own_meanings_among_them(monkeypatch):
    nouns = [f"{n:08d} 05 n 01 thing{'abcdefgh'[n]} 0 000 | definition {n}  \n" for n in range(8)]
    nouns += [
        '00000010 05 n 02 bank 0 shore 0 000 | land beside water; "they sat on the bank"; "a bank"  \n',
        "00000011 05 n 01 bank 0 000 | a house of money  \n",
        '00000012 05 n 01 cat 0 000 | a feline; "the cat sat there"  \n',  # of one meaning
    ]
    monkeypatch.setitem(FILES, f"{corpora.WORDNET}/data.noun", "  1 This software\n" + "".join(nouns))
    monkeypatch.setitem(FILES, f"{corpora.WORDNET}/data.verb", "00000001 30 v 01 bank 0 000 | lean to a side  \n")
    (row,) = corpora.corpus("senses")
    assert (row["sentence"], row["word"]) == ("they sat on the bank", "bank")
    assert len(set(row["passages"])) == 6 and row["passages"][row["right"]] == "land beside water"
    assert {"a house of money", "lean to a side"} < set(row["passages"])
    assert [row] == corpora.corpus("senses")


def message(folder, name, header, body):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"id": name, "text": f"{header}\n\n{body}"}))


def test_mail_is_its_subject_and_its_first_lines_and_no_more_of_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "resolve", lambda source: tmp_path)
    message(tmp_path / "easy-ham-1", "00001", "To: a@b\nSubject: [list-b] Re: Lunch\nX-Spam: no", "At one?\n> Where?")
    html = "<style>p {}</style><p>Win &amp; <b>win</b></p>"
    message(tmp_path / "spam-2", "00002", "Content-Type: text/html", html)
    message(tmp_path / "spam-2", "00003", "Subject: Lunch\nContent-Type: image/png", "gAAA")
    (tmp_path / "file_list.json").write_text("[]")
    assert corpora.corpus("mail") == [
        {"text": "Lunch. At one? > Where?", "label": "ham", "thread": "lunch"},
        {"text": "Win & win", "label": "spam", "thread": "00002"},
        {"text": "Lunch", "label": "spam", "thread": "lunch"},
    ]


def test_the_newswire_is_the_beginning_of_each_story(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "resolve", lambda source: tmp_path / source.rpartition("-")[2])
    head = "Category\tText\nd\tstring\nclass\t\n"
    (tmp_path / "train.tab").write_text(f"{head}earn\tfab industries inc net {'shr ' * 60}\n\n")
    (tmp_path / "test.tab").write_text(f"{head}grain\tussr buys\n")
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


@pytest.mark.parametrize("end", ["bzs", "bzv", "bzz"])
def test_a_damaged_module_is_told(end, monkeypatch):
    name = f"{corpora.KING_JAMES}/ot.{end}"
    monkeypatch.setitem(FILES, name, FILES[name][:-3])
    with pytest.raises(DataError, match=r"is no whole module of SWORD"):
        corpora.corpus("bible")


def test_replies_follow_what_was_said_and_a_turn_is_all_that_one_says():
    assert corpora.corpus("dialogue") == [
        {"before": "", "said": "Hi there", "reply": "Hello.", "conversation": "a", "about": "What if?"},
        {"before": "Hi there", "said": "Hello.", "reply": "How are you?", "conversation": "a", "about": "What if?"},
    ]


@pytest.mark.parametrize("damaged", ["{", "[1]", '{"a": {"messages": [[{}]]}}', '{"a": {"messages": 1}}'])
def test_damaged_conversations_are_told(damaged, monkeypatch):
    monkeypatch.setitem(FILES, corpora.CHATS, damaged)
    with pytest.raises(DataError, match="holds no conversations"):
        corpora.corpus("dialogue")


def test_a_corpus_is_rows_like_any_other_and_a_wrong_name_is_told():
    assert load_rows("corpus:words", limit=2)["word"][:] == ["feline", "dog"]
    with pytest.raises(DataError, match="no corpus 'speling'; there is spelling"):
        load_rows("corpus:speling")
