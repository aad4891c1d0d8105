"""`qwenlet profile`: what it prints and keeps, what it refuses, and what is left of a run that was ended."""

from __future__ import annotations

import json
import sys

import pytest

from cli.conftest import Result
from qwenlet.cli import main
from qwenlet.profiling import session
from qwenlet.profiling.records import Ceilings
from qwenlet.profiling.subject import Subject

SMALL = ("--precisions", "fp32", "--generate", "2,4", "--encode", "8", "--prefill", "8", "--batch", "2",
         "--rounds", "1", "--device", "cpu")  # fmt: skip
CEILINGS = Ceilings(1e9, {"fp32": 1e10}, {"read": "sum", "fp32": "matmul"})


@pytest.fixture
def profile(monkeypatch, capfd):
    from qwenlet.profiling.measure import run_job

    def here(subject, job, threads):  # a process of its own takes seconds; tests/profiling has one
        with subject.load(job.precision) as llm:
            return run_job(llm, job)

    monkeypatch.setattr(session, "run_alone", here)
    monkeypatch.setattr(session, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.delenv("QWENLET_DEBUG", raising=False)

    def call(*arguments: str) -> Result:
        code = main(["profile", *arguments])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


def test_markdown_for_people_and_progress_beside_it(profile):
    result = profile("random:tiny", *SMALL)
    assert result.code == 0, result.err
    assert result.out.startswith("# Profile of random:tiny\n")
    for expected in ("## Generating from one token", "## Peak memory", "## Reading prompts", "## Several replies"):
        assert expected in result.out, expected
    assert "[1/4] fp32" in result.err
    assert "left" in result.err


def test_json_for_programs(profile):
    result = profile("random:tiny", *SMALL, "--json")
    found = json.loads(result.out)
    assert found["finished"]
    assert [row["kind"] for row in found["rows"]] == ["prefill", "batch", "encode", "generate", "generate"]
    assert found["ceilings"]["read"] == 1e9


def test_a_folder_of_it(profile, tmp_path):
    folder = tmp_path / "deep" / "out"
    result = profile("random:tiny", *SMALL, "--out", str(folder))
    assert result.code == 0, result.err
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json", "profile.md", "profile.png"]
    assert (folder / "profile.md").read_text() == result.out.removesuffix("\n")
    assert json.loads((folder / "profile.json").read_text())["finished"]
    again = profile("random:tiny", *SMALL, "--out", str(folder))
    assert again.code == 1
    assert "holds a profile already" in again.err


def test_without_matplotlib_there_is_no_plot_and_it_is_said(profile, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = profile("random:tiny", *SMALL, "--out", str(tmp_path / "out"))
    assert result.code == 0
    assert "no plot" in result.err
    assert "pip install 'qwenlet[profile]'" in result.err


def test_what_is_finished_stays_after_ctrl_c(profile, tmp_path, monkeypatch):
    def ended(subject, job, threads):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_alone", ended)
    result = profile("random:tiny", *SMALL, "--out", str(tmp_path / "out"))
    assert result.code == 130
    assert "(not finished)" in result.out
    assert "## Reading prompts" in result.out
    kept = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [row["kind"] for row in kept["rows"]] == ["prefill", "batch"]
    assert not kept["finished"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--precisions", "int3"), "precisions has 'int3', expected of fp32"),
        (("--attention", "flush"), "attention has 'flush'"),
        (("--generate", "many"), "'many' is no list of numbers"),
        (("--generate", "99999"), "published maths for 32,767"),
        (("--peer", "vllm"), "peer has 'vllm'"),
        (("--limit-seconds", "-1"), "limit_seconds is -1"),
        (("--device", "tpu"), "device is 'tpu'"),
    ],
)
def test_bad_input_gets_words(profile, arguments, words):
    result = profile("random:tiny", *SMALL, *arguments)
    assert result.code in (1, 2)
    assert words in result.err
    assert "Traceback" not in result.err


def test_a_model_that_is_not_there(profile, tmp_path):
    result = profile(str(tmp_path / "nothing"), *SMALL)
    assert result.code == 1
    assert "nothing" in result.err


def test_a_precision_that_does_not_load_is_a_line_of_the_report(profile, monkeypatch):
    load = Subject.load

    def some(self, precision, context=1, progress=None):
        if precision == "int4":
            raise session.ConfigError("no int4 here")
        return load(self, precision, context, progress)

    monkeypatch.setattr(Subject, "load", some)
    result = profile("random:tiny", *SMALL, "--precisions", "fp32,int4")
    assert result.code == 0
    assert "* int4: no int4 here" in result.out
