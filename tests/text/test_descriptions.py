"""Debian's descriptions from made-up lists of apt: fields, paragraphs, sources, packages of two lists."""

import subprocess

import pytest

from tests.text.packages import FILES, put
from upslope import sources
from upslope.errors import DataError
from upslope.text import descriptions


def test_the_first_paragraph_goes_with_the_synopsis_and_the_source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    put({name: text for name, text in FILES.items() if name.startswith("apt:")})
    put({"apt:en/b_Translation-en": "Package: cat\nDescription-en: another\n Of a later list.\n"})
    keys = ("description", "synopsis", "package", "source", "section")
    assert [tuple(row[key] for key in keys) for row in descriptions.descriptions()] == [
        ("Cat shows", "shows a file", "cat", "cat", "admin"),
        ("The dog barks. It barks loudly.", "data of a dog", "dog-data", "dog", "games"),
        ("", "sings", "bird", "bird", ""),
    ]


def test_synopses_stand_beside_each_other_where_they_are_of_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    put({name: text for name, text in FILES.items() if name.startswith("apt:")})
    assert list(descriptions.synopses()) == [
        {"german": "Daten eines Hundes", "english": "data of a dog", "package": "dog-data", "source": "dog"}
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "upslope" / "apt"


def test_lists_are_fetched_once_into_a_folder_of_their_own(cache, monkeypatch):
    calls = []

    def run(command, cwd, **_):
        calls.append(command)
        said = (cwd / "apt.conf").read_text()
        assert f'Dir::State::lists "{cwd}/lists";' in said and '{ "de"; }' in said
        for name in ("x_Packages", "x_Translation-de"):
            (cwd / "lists" / name).write_text("")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.shutil, "which", lambda program: program)
    monkeypatch.setattr(sources.subprocess, "run", run)
    first = sources.apt_index("de")
    assert sources.apt_index("de") == first and len(calls) == 1
    assert [path.name for side in first for path in side] == ["x_Packages", "x_Translation-de"]


def test_without_apt_get_or_with_its_refusal_one_line_says_so(cache, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda program: None)
    with pytest.raises(DataError, match="needs apt-get, which is not here; install apt-get, or use other rows"):
        sources.apt_index("en")
    monkeypatch.setattr(sources.shutil, "which", lambda program: program)
    refused = subprocess.CompletedProcess([], 100, "", "W: a warning\nE: Could not resolve host\n")
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(DataError, match="cannot download descriptions in 'en': E: Could not resolve host"):
        sources.apt_index("en")
