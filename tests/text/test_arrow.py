"""Files read in chunks give the same table as in one piece; large ones stay out of memory; bad lines are counted."""

import json
import tempfile

import pytest
from datasets import Dataset

from tests.faults.large import peak_of_reading
from upslope.errors import DataError
from upslope.text import arrow
from upslope.text.rows import BAD_LIMIT, load_rows

ROWS = [
    {"id": 1, "text": "é", "score": 1},
    {"id": 2, "text": None, "score": 2},
    {"id": 3, "text": "c", "score": 2.5, "tags": ["x"]},
    {"id": 4, "text": "d", "tags": []},
    {"id": 5, "text": "e", "turns": [{"role": "user"}]},
    {"id": 6, "text": "f", "turns": [{"role": "user", "content": "hi"}, {"content": "ho"}]},
    {"id": 7, "late": {"deep": 1}},
]


@pytest.mark.parametrize("kept", [0, 1 << 26])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_chunks_change_nothing(tmp_path, monkeypatch, size, kept):
    monkeypatch.setattr(arrow, "CHUNK_ROWS", size)
    monkeypatch.setattr(arrow, "KEPT_BYTES", kept)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    whole = {name: [row.get(name) for row in ROWS] for name in ("id", "text", "score", "tags", "turns", "late")}
    found = load_rows(path)
    expected = Dataset.from_dict(whole)
    assert found.features == expected.features and found.to_list() == expected.to_list()
    assert found.select([5, 0])["text"][:] == ["f", "é"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_types_that_do_not_go_together_are_told_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "CHUNK_ROWS", 2)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a": "four"}\n{"a": 5}\n')
    with pytest.raises(
        DataError, match=r"a.jsonl, row 3, column 'a' is 'four', other rows have 3; give every"
    ) as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ('{"a": NaN}', r"row 2, column 'a' is nan, other rows have 'x'; give every column one type"),
        ('{"a": ["y"]}', r"row 2, column 'a' is \['y'\], other rows have 'x'"),
        ('{"a": "z", "b": "\\ud800"}', r"row 2, column 'b': half a character in '\\ud800'; mend that row"),
    ],
)
def test_a_value_that_does_not_fit_is_told_by_row_and_column(tmp_path, last, message):
    (tmp_path / "a.jsonl").write_text(f'{{"a": "x"}}\n{{"b": null}}\n{last}\n')
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize("count", [2, 10_000, BAD_LIMIT + 50])
def test_bad_lines_are_counted_at_once(tmp_path, count):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 3 + b'{"a": \n' + b"[1]\n" * (count - 2) + b"\xff\n" + b'{"a": 2}\n')
    more = f"over {BAD_LIMIT}" if count > BAD_LIMIT else f"{count - 1}"
    named = "5" if count == 2 else "5, 6, 7, 8, 9, ..."
    with pytest.raises(DataError, match=rf"line 4 is not JSON: .* \(and {more} more lines: {named}\); mend") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bad_rows_of_csv_are_counted_too(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"line 3 has 1 fields, the header 2 \(and 1 more lines: 5\)"):
        load_rows(tmp_path / "a.csv")


def test_a_limit_that_is_reached_before_a_bad_line_is_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\nnonsense\n')
    assert load_rows(tmp_path / "a.jsonl", limit=2)["a"][:] == [1, 2]
    with pytest.raises(DataError, match="line 3"):
        load_rows(tmp_path / "a.jsonl", limit=3)


def test_read_only_data_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert load_rows(path).to_list() == [{"a": 1}]
    finally:
        tmp_path.chmod(0o755)


def test_a_disk_that_refuses_the_rows_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "CHUNK_ROWS", 2)
    monkeypatch.setattr(arrow, "KEPT_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 5)
    with pytest.raises(
        DataError, match=r"cannot keep the rows of .*a.jsonl in .*missing: .*; free space or set TMPDIR"
    ):
        load_rows(tmp_path / "a.jsonl")


def test_a_large_file_takes_little_memory(tmp_path):
    """120 MB of lines, read, cleaned and split; `make large` does the same with a gigabyte."""
    told = peak_of_reading(tmp_path, 120_000_000)
    assert told["rows"] > 120_000 and told["grown_mb"] < 150
