"""Small made-up packages, put where upslope keeps what it has fetched, so that every corpus is made of them."""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from upslope.sources import PACKAGES, cache_folder
from upslope.text import corpora, labelled


def module(*entries: str) -> dict[str, bytes]:
    """The three files of a testament in one block: what index, places and packed text say of these entries."""
    plain, places = b"", b""
    for text in entries:
        places += struct.pack("<IIH", 0, len(plain), len(text.encode()))
        plain += text.encode()
    packed = zlib.compress(plain)
    return {"bzs": struct.pack("<III", 0, len(packed), len(plain)), "bzv": places, "bzz": packed}


def message(header: str, body: str) -> str:
    return json.dumps({"id": "1", "text": f"{header}\n\n{body}"})


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
TURNS = [["Hi", "there"], ["Hello."], ["How  are you?"]]
CHATS = {
    "a": {"messages": [[{"text": text} for text in turn] for turn in TURNS], "prompt": "What if?"},
    "b": {"messages": [[{"text": "nobody answers"}]], "prompt": "Why?"},
    "c": {"messages": [[{"text": "Pizza?"}], [{"text": "Yes."}]]},  # the earliest have no prompt
}
HEAD = "Category\tText\nd\tstring\nclass\t\n"
PACKAGE_LIST = """Package: dog-data
Source: dog (1.2)
Section: contrib/games
Description: data

Package: cat
Section: admin
"""
TRANSLATIONS = """Package: cat
Description-md5: 1
Description-en: shows a file
 Cat shows
  - one file
 and more.

Package: dog-data
Description-md5: 2
Description-en: data of a dog
 The dog barks. It
 barks loudly.
 .
 This is its data.

Package: bird
Description-en: sings
"""
GERMAN = """Package: dog-data
Description-md5: 2
Description-de: Daten eines Hundes
 Der Hund bellt.

Package: cat
Description-md5: older
Description-de: schreibt eine Datei

Package: bird
Description-de: singt
"""
MEANINGS = "".join(f"{n:08d} 05 n 01 thing{'abcdef'[n]} 0 000 | definition {n}  \n" for n in range(6))
FILES: Mapping[str, str | bytes] = {
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
    **{
        f"{name}/{side}.{end}": data
        for name, files in MODULES.items()
        for side in ("ot", "nt")
        for end, data in files.items()
    },
    corpora.CHATS: json.dumps(CHATS),
    f"{labelled.MAIL}/easy-ham-1/00001.json": message(
        "To: a@b\nSubject: [list-b] Re: Lunch\nX-Spam: no", "At one?\n> Where?"
    ),
    f"{labelled.MAIL}/spam-2/00002.json": message(
        "Content-Type: text/html", "<style>p {}</style><p>Win &amp; <b>win</b></p>"
    ),
    f"{labelled.MAIL}/spam-2/00003.json": message("Subject: Lunch\nContent-Type: image/png", "gAAA"),
    f"{labelled.MAIL}/file_list.json": "[]",
    labelled.NEWSWIRE.format(side="train"): f"{HEAD}earn\tfab industries inc net {'shr ' * 60}\n\n",
    labelled.NEWSWIRE.format(side="test"): f"{HEAD}grain\tussr buys\n",
    "apt:en/a_Packages": PACKAGE_LIST,
    "apt:en/a_Translation-en": TRANSLATIONS,
    "apt:en/whole": "",
    "apt:de/a_Packages": PACKAGE_LIST,
    "apt:de/a_Translation-de": GERMAN,
    "apt:de/whole": "",
}
# the same with words of several meanings and enough of these to choose from
SENSES = {
    f"{corpora.WORDNET}/data.noun": (
        f"  1 This software\n{MEANINGS}"
        '00000010 05 n 02 bank 0 shore 0 000 | land beside water; "they sat on the bank"; "a bank"  \n'
        "00000011 05 n 01 bank 0 000 | a house of money  \n"
        '00000012 05 n 01 cat 0 000 | a feline; "the cat sat there"  \n'
    ),
    f"{corpora.WORDNET}/data.verb": "00000001 30 v 01 bank 0 000 | lean to a side  \n",
}


def kept(source: str) -> Path:
    """Where upslope keeps a file of a package under $XDG_CACHE_HOME: `apt:` ones are apt's lists."""
    if source.startswith("apt:"):
        language, _, name = source.removeprefix("apt:").partition("/")
        return cache_folder() / "apt" / language / ("" if name == "whole" else "lists") / name
    kind = source.partition(":")[0]
    match = PACKAGES[kind].fullmatch(source)
    assert match, source
    label = f"{match['name']}-{match['version']}" if match["version"] else match["name"]
    ending = ".folders" if source.startswith(labelled.MAIL) else ""
    return cache_folder() / kind / (label.replace("/", "_") + ending) / match["member"]


def put(files: Mapping[str, str | bytes]) -> None:
    """Write files of packages where `resolve` finds them. XDG_CACHE_HOME must be a folder of the test's."""
    for source, data in files.items():
        path = kept(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
