import bz2
import gzip
import json

import pytest
from datasets import Dataset

from upslope.errors import DataError
from upslope.text import cleaning
from upslope.text.rows import load_rows, require_columns

ROWS = [{"text": 'naïve, "quoted"', "n": 1}, {"text": "zwei\nlines", "n": 2}]

PACKED = gzip.compress("".join(f"{n * n}\n" for n in range(400)).encode(), mtime=0)
SCRAMBLED = PACKED[:40] + bytes(60) + PACKED[100:]  # whole at both ends: zlib itself gives up in the middle


def write(path, content):
    path.write_bytes(content)
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "b.jsonl.bz2", bz2.compress(lines)),
        write(tmp_path / "c.jsonl.gz", gzip.compress(lines)),
        write(tmp_path / "d.json", json.dumps(ROWS).encode()),
        write(tmp_path / "e.jsonl", b"\xef\xbb\xbf" + lines + b"\n\n"),
    ]
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "f.parquet"))
    for file in [*files, tmp_path / "f.parquet", ROWS, Dataset.from_list(ROWS)]:
        assert load_rows(file).to_list() == ROWS
    csv = write(tmp_path / "g.csv", 'text,n\n"naïve, ""quoted""",1\n"zwei\nlines",2\n'.encode())
    assert [r["text"] for r in load_rows(csv)] == [r["text"] for r in ROWS]
    tsv = write(tmp_path / "h.tsv", b"text\tn\nx\t1\n")
    assert load_rows(tsv).to_list() == [{"text": "x", "n": "1"}]


def test_text_of_a_parquet_file_that_is_no_utf8_is_told_when_it_is_read(tmp_path):
    """Found by `make fuzz`: the table was made, and the first look at the row raised."""
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    whole = (tmp_path / "a.parquet").read_bytes()
    assert whole.count(b"zwei") >= 1
    with pytest.raises(DataError, match=r"a.parquet is not a whole parquet file: .*UTF8"):
        load_rows(write(tmp_path / "a.parquet", whole.replace(b"zwei", b"zw\xdci")))


def test_a_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": 2}\nnot json\n')
    assert load_rows(path, limit=2)["a"][:] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not UTF-8: byte 8 is 0xff"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is a list, not an object"),
        ("a.jsonl", b"", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3 has 1 fields, the header 2"),
        ("a.csv", b'a,b\n1,"2\n', "line 2 is not CSV"),
        ("a.json", b"{}", "not a list of objects"),
        ("a.parquet", b"PAR1garbage", "not a whole parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:20], "cannot read"),
        ("b.jsonl.gz", SCRAMBLED, "cannot read"),
        ("b.json", b"[" * 100_000, "b.json is not JSON"),
        ("b.csv", b"text,n,text\na,1,b\n", "line 1 names the column 'text' twice"),
        ("a.txt", b"x", "files of kind .txt"),
        ("a.jsonl", b'{"a": 1}\n{"a": {"b": 2}}\n', "a.jsonl"),
    ],
)
def test_damaged_files_are_told_by_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_no_rows_wrong_types_and_missing_columns(tmp_path):
    with pytest.raises(DataError, match="there are no rows"):
        load_rows([])
    with pytest.raises(DataError, match="rows of type int"):
        load_rows(3)
    with pytest.raises(DataError, match="is a folder"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match="no column 'txt'; did you mean 'text'"):
        require_columns(Dataset.from_list(ROWS), ["txt"], "rows")


def test_endings_in_capitals_are_read(tmp_path):
    assert load_rows(write(tmp_path / "A.CSV", b"a\nx\n")).to_list() == [{"a": "x"}]
    assert load_rows(write(tmp_path / "B.TSV.GZ", gzip.compress(b"a\tb\nx\ty\n"))).to_list() == [{"a": "x", "b": "y"}]


def test_local_files_leave_nothing_behind(tmp_path, monkeypatch, capfd):
    """A home folder that cannot be written to is no reason not to read a file; nor does reading draw bars."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    capfd.readouterr()
    load_rows(tmp_path / "a.parquet")
    load_rows(tmp_path / "a.jsonl")
    assert not cache.exists() and capfd.readouterr() == ("", "")


def test_a_hundred_thousand_lines_are_read_cleaned_and_split(tmp_path):
    lines = "".join(f'{{"text": "row {n}", "g": {n % 997}}}\n' for n in range(100_000))
    rows = load_rows(write(tmp_path / "a.jsonl", lines.encode()))
    kept, account = cleaning.clean(rows, text="text")
    sides, _ = cleaning.split(kept, group="g", fractions={"train": 0.9, "test": 0.1}, seed=0)
    assert account.kept == 100_000 and sum(len(side) for side in sides.values()) == 100_000
