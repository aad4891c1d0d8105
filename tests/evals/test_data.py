"""Data is what was published, or it is refused by name."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from qwenlet.errors import EvalError
from qwenlet.evals import data as module
from qwenlet.evals.data import DataFolder, Expected, expected

CSV = 'id,question,A\n0,"a, b",x\n1,"two\nlines",y\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFolder:
    """A folder whose one known file is exam/test.csv."""
    known = {"exam/test.csv": Expected(2, hashlib.sha256(CSV.encode()).hexdigest())}
    monkeypatch.setattr(module, "expected", lambda: known)
    (tmp_path / "exam").mkdir()
    (tmp_path / "exam" / "test.csv").write_text(CSV, encoding="utf-8", newline="")
    return DataFolder(tmp_path)


def test_rows_by_their_header(folder: DataFolder) -> None:
    assert folder.rows("exam/test.csv") == [
        {"id": "0", "question": "a, b", "A": "x"},
        {"id": "1", "question": "two\nlines", "A": "y"},
    ]


def test_an_altered_file_is_refused_with_both_sums(folder: DataFolder) -> None:
    (folder.root / "exam" / "test.csv").write_text(CSV.replace("x", "y"), encoding="utf-8", newline="")
    with pytest.raises(EvalError, match=r"test\.csv is not the published file: its SHA-256 is .*expected .*2 records"):
        folder.rows("exam/test.csv")


def test_unchecked_data_is_read_and_remembered(folder: DataFolder) -> None:
    (folder.root / "exam" / "test.csv").write_text(CSV + "2,c,z\n", encoding="utf-8", newline="")
    loose = DataFolder(folder.root, unchecked=True)
    assert len(loose.rows("exam/test.csv")) == 3
    assert loose.altered == ["exam/test.csv"]


def test_a_missing_file_says_what_it_should_hold(folder: DataFolder) -> None:
    (folder.root / "exam" / "test.csv").unlink()
    with pytest.raises(EvalError, match=r"can't read .*test\.csv.*expected with 2 records") as caught:
        folder.rows("exam/test.csv")
    assert "--data-dir" in (caught.value.hint or "")


def test_a_row_too_short_is_named(folder: DataFolder) -> None:
    (folder.root / "exam" / "other.csv").write_text("a,b\n1,2\n3\n", encoding="utf-8")
    with pytest.raises(EvalError, match=r"row 2 of .*other\.csv has 1 columns, expected 2"):
        folder.rows("exam/other.csv")


def test_bad_json_and_bad_bytes_are_named(folder: DataFolder) -> None:
    (folder.root / "a.jsonl").write_text('{"x": 1}\n{"x"\n', encoding="utf-8")
    with pytest.raises(EvalError, match=r"a\.jsonl is not valid JSON"):
        folder.json_lines("a.jsonl")
    (folder.root / "b.txt").write_bytes(b"ok \xff")
    with pytest.raises(EvalError, match=r"b\.txt is not valid UTF-8 at byte 3"):
        folder.text("b.txt")


def test_gz_is_unpacked(folder: DataFolder) -> None:
    (folder.root / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n'))
    assert folder.json_lines("a.jsonl.gz") == [{"x": 1}]


def test_the_table_knows_the_published_counts() -> None:
    counts: dict[str, int] = {}
    for name, entry in expected().items():
        part = "/".join(name.split("/")[:2])
        counts[part] = counts.get(part, 0) + entry.records
        assert len(entry.sha256) == 64
    assert {name: counts[name] for name in ("mmlu/test", "mmlu/dev", "ceval/val", "ceval/test", "bbh/bbh")} == {
        "mmlu/test": 14042, "mmlu/dev": 285, "ceval/val": 1346, "ceval/test": 12342, "bbh/bbh": 6511,
    }  # fmt: skip
    assert counts["gsm8k/test.jsonl"] == 1319
    assert counts["humaneval/HumanEval.jsonl.gz"] == 164


def test_an_archive_that_is_cut_or_none_is_named(folder: DataFolder) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 100)
    damaged = whole[:10] + b"\xff" * 8 + whole[18:]
    for raw, reason in ((whole[:-9], "ended"), (b"hello", "[Nn]ot a gzipped"), (damaged, "invalid block type")):
        (folder.root / "exam" / "other.jsonl.gz").write_bytes(raw)
        with pytest.raises(EvalError, match=rf"can't unpack .*other\.jsonl\.gz: .*{reason}"):
            folder.json_lines("exam/other.jsonl.gz")


def test_an_empty_table_has_no_header(folder: DataFolder) -> None:
    (folder.root / "exam" / "other.csv").touch()
    with pytest.raises(EvalError, match=r"other\.csv is empty, expected a header and rows"):
        folder.rows("exam/other.csv")


def test_a_line_that_is_no_json_is_named(folder: DataFolder) -> None:
    (folder.root / "exam" / "other.jsonl").write_text('{"a": 1}\n\n{"a": \n', encoding="utf-8")
    with pytest.raises(EvalError, match=r"line 3 of .*other\.jsonl is not valid JSON"):
        folder.json_lines("exam/other.jsonl")
