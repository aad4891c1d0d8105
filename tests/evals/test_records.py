"""A run's file survives a kill at any byte, and says what it was made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.errors import EvalError
from qwenlet.evals.records import Record, SampleLog, Settings, read_log
from qwenlet.evals.task import Answer, Continuation, Result, Sample, Scored

SETTINGS = Settings("mmlu", "demo", "f" * 64, "fp32", "none", "float32", 1234, "0.1.0")


def result(number: int, text: str = "B 答案") -> Result:
    sample = Sample(f"anatomy/{number}", Continuation(f"question {number}"), "B", "anatomy")
    return Result(sample, Answer(texts=(text,), finish_reasons=("stop",)), Scored({"accuracy": 1.0}, {"first": None}))


def written(path: Path, count: int = 5) -> bytes:
    with SampleLog(path, SETTINGS) as log:
        for number in range(count):
            log.add(result(number))
    return path.read_bytes()


def test_lines_come_back_as_they_were(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl")
    settings, records = read_log(tmp_path / "a.jsonl")
    assert settings == SETTINGS
    assert records == [Record.of(result(number)) for number in range(5)]


def test_a_line_says_by_itself_how_it_came_about(tmp_path: Path) -> None:
    line = json.loads(written(tmp_path / "a.jsonl").splitlines()[3])
    assert line["prompt_sha256"] == result(2).sample.prompt_sha256
    assert line["with"]["model"] == "demo"
    assert line["with"]["precision"] == "fp32"
    assert line["with"]["quantization"] == "none"


def test_a_kill_at_any_byte_costs_at_most_the_last_line(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.jsonl", 3)
    path = tmp_path / "cut.jsonl"
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        kept = max(whole[:end].count(b"\n") - 1, 0)
        with SampleLog(path, SETTINGS) as log:
            assert len(log.kept) == kept
            assert log.dropped == (not whole[:end].endswith(b"\n") and end > 0)
            for number in range(kept, 3):
                log.add(result(number))
        assert path.read_bytes() == whole


def test_a_last_line_of_rubbish_goes(tmp_path: Path) -> None:
    """A disk that was full, or a machine that lost power, can leave zeros with a line break behind them."""
    path = tmp_path / "a.jsonl"
    whole = written(path)
    path.write_bytes(whole + b"\0\0\0\n")
    with SampleLog(path, SETTINGS) as log:
        assert (len(log.kept), log.dropped) == (5, True)
    assert path.read_bytes() == whole


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"id": 1}\n', *lines[3:]]))
    with pytest.raises(EvalError, match=r"line 3 of .*a\.jsonl is damaged"):
        SampleLog(path, SETTINGS)


@pytest.mark.parametrize("name", ["model", "weights", "precision", "quantization", "kv_cache", "seed", "version"])
def test_another_run_is_not_continued(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jsonl"
    before = written(path)
    other = 7 if name == "seed" else "other"
    with pytest.raises(EvalError, match=f"was made with {name} "):
        SampleLog(path, replace(SETTINGS, **{name: other}))
    assert path.read_bytes() == before


@given(st.text(st.characters(), max_size=60))
def test_any_text_can_be_kept(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    with SampleLog(path, SETTINGS) as log:
        log.add(result(0, text))
    assert read_log(path)[1] == [Record.of(result(0, text))]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"none\.jsonl does not exist"):
        read_log(tmp_path / "none.jsonl")
