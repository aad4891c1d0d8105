"""A run from the command line: killed and taken up, at several precisions, compared and reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qwenlet
from evals import folders
from qwenlet.cli import main
from qwenlet.errors import EvalError
from qwenlet.evals import tasks
from qwenlet.evals.compare import Side, between, compare
from qwenlet.evals.data import DataFolder
from qwenlet.evals.records import Record, Settings, read_log
from qwenlet.evals.report import report, save
from qwenlet.evals.run import PRECISIONS, Progress, Run, choose, read_results
from qwenlet.evals.task import Answer, Continuation, Sample, Scored


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folders.mmlu(tmp_path / "data")
    folders.gsm8k(tmp_path / "data")
    return tmp_path


def a_run(root: Path, out: str = "run", **options: object) -> Run:
    return Run(root / out, DataFolder(root / "data", unchecked=True), "byte-qwen", **options)  # type: ignore[arg-type]


def loader(path: Path):  # type: ignore[no-untyped-def]
    return lambda precision: qwenlet.load(str(path), device="cpu", max_context=2048, **PRECISIONS[precision])


def lines_of(path: Path) -> dict[str, dict[str, object]]:
    """Samples by id, as the file has them."""
    return {value["id"]: value for value in map(json.loads, path.read_text().splitlines()[1:])}


# ------------------------------------------------------------------------------------------------- resuming


def test_a_run_killed_at_any_time_goes_on_where_it_was(root: Path, byte_qwen: Path) -> None:
    """SIGKILL again and again; in the end every sample is there once, with the answer of a run that was left alone."""
    command = [
        sys.executable, "-m", "qwenlet", "eval", "mmlu", "--model", str(byte_qwen), "--data-dir", str(root / "data"),
        "--out", str(root / "run"), "--precisions", "fp32", "--unchecked-data",
        "--max-context", "2048", "--max-requests", "1",
    ]  # fmt: skip
    log = root / "run" / "samples" / "mmlu.fp32.jsonl"
    seen = 0
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") > seen + 5:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        seen = log.read_bytes().count(b"\n")
    before = log.read_bytes()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = before[: before.rindex(b"\n") + 1]
    assert log.read_bytes().startswith(kept), "what was there stayed there"
    assert "goes on after" in done.stderr or kept.count(b"\n") == 115
    ids = [json.loads(line)["id"] for line in log.read_text().splitlines()[1:]]
    assert len(ids) == len(set(ids)) == 114

    whole = a_run(root, "whole")
    whole.evaluate(["mmlu"], loader(byte_qwen), ["fp32"])
    alone = lines_of(root / "whole" / "samples" / "mmlu.fp32.jsonl")
    for id, line in lines_of(log).items():
        assert line["answer"] == alone[id]["answer"], id


def test_a_finished_run_asks_nothing_again(root: Path, byte_qwen: Path) -> None:
    notes: list[str] = []
    for _ in range(2):
        (outcome,) = a_run(root, limit=10, note=notes.append).evaluate(["mmlu"], loader(byte_qwen), ["fp32"])
    assert (outcome.count, outcome.computed) == (10, 0)
    assert notes == ["mmlu at fp32 goes on after 10 of 10 samples"]


def test_a_larger_limit_adds_to_what_is_there(root: Path, byte_qwen: Path) -> None:
    a_run(root, limit=10).evaluate(["mmlu"], loader(byte_qwen), ["fp32"])
    (outcome,) = a_run(root, limit=25).evaluate(["mmlu"], loader(byte_qwen), ["fp32"])
    assert (outcome.count, outcome.computed) == (25, 15)


def test_choices_of_samples_are_fixed_and_nested() -> None:
    samples = [Sample(str(n), Continuation(str(n)), None) for n in range(100)]
    ten, thirty = choose(samples, 10, 1), choose(samples, 30, 1)
    assert [s.id for s in ten] == sorted((s.id for s in ten), key=int)
    assert {s.id for s in ten} < {s.id for s in thirty}
    assert {s.id for s in ten} != {s.id for s in choose(samples, 10, 2)}
    assert choose(samples, None, 1) == choose(samples, 1000, 1) == samples


def test_changed_questions_are_not_mixed(root: Path, byte_qwen: Path) -> None:
    a_run(root).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])
    folders.write(root / "data", "gsm8k/qwen_gsm8k_prompt.txt", "Another prompt\n")
    with pytest.raises(EvalError, match="its question was another one"):
        a_run(root).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])


def test_another_seed_does_not_fit(root: Path, byte_qwen: Path) -> None:
    a_run(root).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])
    with pytest.raises(EvalError, match="was made with seed 1234, but now it is 5"):
        a_run(root, seed=5).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])


def test_another_model_does_not_fit(root: Path, byte_qwen: Path, tmp_path: Path) -> None:
    import shutil

    a_run(root).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])
    other = shutil.copytree(byte_qwen, tmp_path / "other")
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    with pytest.raises(EvalError, match="was made with weights"):
        a_run(root).evaluate(["gsm8k"], loader(other), ["fp32"])


# ----------------------------------------------------------------------------------- precisions, results, report


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, byte_qwen: Path) -> Path:
    """A run of two tasks at four precisions."""
    root = tmp_path_factory.mktemp("finished")
    folders.mmlu(root / "data")
    folders.gsm8k(root / "data")
    told: list[Progress] = []
    run = a_run(root, limit=40)
    run.evaluate(["mmlu", "gsm8k-chat"], loader(byte_qwen), ["fp32", "bf16", "int8", "int4"], told.append)
    assert {(p.task, p.precision) for p in told} == {
        (t, p) for t in ("mmlu", "gsm8k-chat") for p in PRECISIONS if p in ("fp32", "bf16", "int8", "int4")
    }
    assert all(0 < p.done <= p.total and p.seconds_left is not None for p in told)
    return root / "run"


def test_results_say_what_was_run_and_how(finished: Path) -> None:
    outcomes = {(o["task"], o["precision"]): o for o in read_results(finished)["outcomes"]}
    assert len(outcomes) == 8
    mmlu = outcomes["mmlu", "int4"]
    assert (mmlu["count"], mmlu["available"]) == (40, 114)
    assert mmlu["settings"]["quantization"].startswith("1")
    assert "int4/" in mmlu["settings"]["quantization"]
    assert outcomes["mmlu", "fp32"]["settings"]["quantization"] == "none"
    assert mmlu["settings"]["kv_cache"] == "int8"
    assert len({o["settings"]["weights"] for o in outcomes.values()}) == 1
    accuracy = mmlu["summary"]["figures"][0]
    assert accuracy["name"] == "accuracy"
    assert accuracy["error"] == pytest.approx((accuracy["value"] * (1 - accuracy["value"]) / 39) ** 0.5)


def test_every_precision_answers_the_same_samples(finished: Path) -> None:
    ids = [set(lines_of(finished / "samples" / f"mmlu.{p}.jsonl")) for p in ("fp32", "bf16", "int8", "int4")]
    assert ids[0] == ids[1] == ids[2] == ids[3]
    first, last = (lines_of(finished / "samples" / f"mmlu.{p}.jsonl") for p in ("fp32", "int4"))
    assert any(first[id]["answer"] != last[id]["answer"] for id in first), "the kernels of each precision ran"


def test_what_could_not_be_read_is_counted_and_listed(finished: Path) -> None:
    """The random model says nothing with a number in it, or something; both are in the file."""
    outcome = next(o for o in read_results(finished)["outcomes"] if o["task"] == "gsm8k-chat")
    _, records = read_log(finished / "samples" / f"gsm8k-chat.{outcome['precision']}.jsonl")
    unread = [r.id for r in records if r.scored.extracted["improved"] is None]
    assert sorted(outcome["unread"].get("improved", [])) == sorted(unread)
    assert sorted(outcome["cut"]) == sorted(r.id for r in records if r.answer.finish_reasons == ("length",))


def test_the_report_has_the_card_beside_ours_and_says_what_is_missing(finished: Path) -> None:
    built = report(finished)
    text = built.markdown()
    assert "Firefly-Bloom-1B4" in text
    assert "card 33.7" in text
    assert "| HumanEval | " not in text.split("## What was not run")[1]
    assert "`ceval-test`" in text.split("## What was not run")[1]
    assert "`mmlu`" not in text.split("## What was not run")[1].split("in part only")[0]
    assert "`mmlu` (40 of 114 samples)" in text
    assert "McNemar, exact" in text
    paths = save(built, finished)
    assert [path.name for path in paths] == ["report.md", "report.json", "report.html"]
    assert json.loads((finished / "report.json").read_text())["title"] == "Evaluation of byte-qwen"
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "the page needs nothing from elsewhere"


def test_comparing_pairs_precisions(finished: Path) -> None:
    found = compare(f"{finished}:fp32", f"{finished}:int4")
    assert {(c.task, c.measure) for c in found} == {
        ("mmlu", "accuracy"), ("gsm8k-chat", "published"), ("gsm8k-chat", "improved"),
    }  # fmt: skip
    assert (found[0].first, found[0].second, found[0].left_out) == ("fp32", "int4", 0)
    same = compare(str(finished), str(finished))
    assert len(same) == 4 * 3
    assert all(c.result.p_value == 1.0 for c in same)


def test_a_measure_of_some_questions_only_is_compared_on_these() -> None:
    """As of tool use: what needs a tool can be selected rightly, what needs none can be a false alarm."""

    def side(precision: str, *values: dict[str, float]) -> Side:
        records = [
            Record(f"q{place}", "hash", "x", "", Answer(), Scored(value)) for place, value in enumerate(values)
        ]  # fmt: skip
        return Side(Settings("tool-use", "m", "w", precision, "none", "fp32", 1, "0"), {r.id: r for r in records})

    one = side("fp32", {"chosen": 1.0}, {"chosen": 0.0}, {"alarm": 1.0}, {"chosen": 1.0})
    other = side("int4", {"chosen": 0.0}, {"chosen": 0.0}, {"alarm": 0.0})
    found = {c.measure: c for c in between(one, other)}
    assert {name: (c.result.count, c.left_out) for name, c in found.items()} == {"chosen": (2, 1), "alarm": (1, 0)}
    assert (found["chosen"].result.difference, found["alarm"].result.difference) == (-0.5, -1.0)


def test_comparing_what_has_nothing_in_common(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="has nothing at 'fp16'"):
        compare(f"{finished}:fp16", str(finished))
    with pytest.raises(EvalError, match="is no run"):
        compare(str(tmp_path), str(finished))


# ------------------------------------------------------------------------------------------------- bad input


def test_altered_data_is_refused_before_anything_runs(root: Path, byte_qwen: Path) -> None:
    run = Run(root / "run", DataFolder(root / "data"), "byte-qwen")
    with pytest.raises(EvalError, match="is not the published file"):
        run.evaluate(["mmlu"], loader(byte_qwen), ["fp32"])
    assert not (root / "run").exists()


def test_unchecked_data_is_named_in_the_report(root: Path, byte_qwen: Path) -> None:
    a_run(root, limit=3).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])
    assert "gsm8k/test.jsonl" in report(root / "run").markdown().split("## How it was made")[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "gsm8k has no samples: its data in .* is empty"),
        ('{"q": 1}\n', r"gsm8k can't use .*test\.jsonl, which is not the published file: KeyError: 'question'"),
        ("[1]\n", r"gsm8k can't use .*test\.jsonl, which is not the published file: TypeError"),
    ],
)
def test_unchecked_data_of_another_kind_is_named(root: Path, byte_qwen: Path, content: str, message: str) -> None:
    (root / "data" / "gsm8k" / "test.jsonl").write_text(content)
    with pytest.raises(EvalError, match=message):
        a_run(root).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])
    assert not (root / "run").exists()


def test_a_folder_that_can_not_be_is_refused(root: Path, byte_qwen: Path) -> None:
    (root / "run").write_text("a file")
    with pytest.raises(EvalError, match="run can't be the folder of a run: "):
        a_run(root).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])


def test_a_model_without_a_chat_format_is_not_asked_to_chat(root: Path, byte_qwen: Path, tmp_path: Path) -> None:
    import shutil

    base = shutil.copytree(byte_qwen, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"chat_format": "raw", "eos_token_id": 256}))
    with pytest.raises(EvalError, match=r"gsm8k-chat asks for chat, but .* has no chat format"):
        a_run(root).evaluate(["gsm8k-chat"], loader(base), ["fp32"])


DAMAGED = [
    '{"outcomes": [',
    "[1]",
    "{}",
    '{"model": "m", "seed": 1, "altered_data": [], "outcomes": [{"task": "gsm8k"}]}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_truncated_results_file_says_how_to_get_it_back(root: Path, content: str) -> None:
    (root / "run").mkdir()
    (root / "run" / "results.json").write_text(content)
    with pytest.raises(EvalError, match=r"results\.json is damaged"):
        report(root / "run")


def test_damaged_results_are_written_again(root: Path, byte_qwen: Path) -> None:
    for content in DAMAGED:
        a_run(root, limit=3).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])
        (root / "run" / "results.json").write_text(content)
    a_run(root, limit=3).evaluate(["gsm8k"], loader(byte_qwen), ["fp32"])
    assert len(read_results(root / "run")["outcomes"]) == 1


def test_unknown_names_are_refused(root: Path, byte_qwen: Path) -> None:
    with pytest.raises(EvalError, match="there is no precision 'int3'"):
        a_run(root).evaluate(["mmlu"], loader(byte_qwen), ["int3"])


def test_the_command_line_lists_compares_and_reports(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(tasks.TASKS)
    assert main(["eval", "compare", f"{finished}:fp32", f"{finished}:int4"]) == 0
    assert "mmlu, accuracy: fp32" in capsys.readouterr().out
    assert main(["eval", "report", str(finished)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(finished / f"report.{kind}") for kind in ("md", "json", "html")]
    assert main(["eval", "report", "/nowhere"]) == 1
    assert "/nowhere/results.json does not exist" in capsys.readouterr().err
