"""`qwenlet quantize`: what its flags ask for, what it writes, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwenlet.checkpoint import Checkpoint, write_random
from qwenlet.cli import quantize as verb
from qwenlet.config import QuantConfig, qwen_1_8b
from qwenlet.quant import pipeline, report
from qwenlet.quant.calibration import Calibration
from qwenlet.quant.pipeline import Outcome
from qwenlet.quant.workfolder import WeightError


def tiny(path: Path, vocabulary: int = 64) -> Path:
    config = replace(
        qwen_1_8b(), vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_hidden_layers=1,
    )  # fmt: skip
    return write_random(path, config)


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny(tmp_path / "tiny")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[QuantConfig, Calibration | None]]:
    """What the pipeline was asked for; nothing is quantized."""
    calls = []

    def quantize(source, out, quant, calibration=None, *, progress=None) -> Outcome:
        calls.append((quant, calibration))
        errors = [WeightError("transformer.h.0.mlp.w1", 0.04, 0.16)]
        return Outcome(Path(out), quant, calibration, errors, resumed=2)

    monkeypatch.setattr(pipeline, "quantize", quantize)
    picked = Calibration((torch.tensor([1, 2, 3]),), "builtin")
    monkeypatch.setattr(verb, "_calibration", lambda *arguments: picked)
    return calls


def test_the_default_is_gptq_in_four_bits(run, model, asked) -> None:
    result = run("quantize", str(model), "out", "--no-report")
    assert (result.code, result.out) == (0, "out\n")
    ((quant, calibration),) = asked
    assert quant == QuantConfig(method="gptq", desc_act=True, static_groups=True)
    assert calibration is not None
    assert "went on after 2 finished layers" in result.err
    assert "transformer.h.0.mlp.w1 needed damping of 16%" in result.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--bits", "8"], {"bits": 8, "head_bits": 8, "head_group_size": None}),
        (
            ["--head-bits", "16", "--embedding-bits", "16"],
            {"head_bits": None, "head_group_size": None, "embedding_bits": None},
        ),
        (["--bits", "8", "--head-bits", "4"], {"bits": 8, "head_bits": 4}),
        (["--no-static-groups", "--no-sym"], {"static_groups": False, "sym": False}),
        (["--no-desc-act"], {"desc_act": False, "static_groups": False}),
        (["--group-size", "64", "--damp-percent", "0.05"], {"group_size": 64, "damp_percent": 0.05}),
        (["--no-mse", "--no-true-sequential"], {"mse": False, "true_sequential": False}),
    ],
)
def test_flags_reach_the_settings(flags, expected, run, model, asked) -> None:
    assert run("quantize", str(model), "out", "--no-report", *flags).code == 0
    assert asked[0][0] == replace(QuantConfig(method="gptq", desc_act=True, static_groups=True), **expected)


def test_a_head_that_the_layout_can_not_hold_is_told_before_the_work(run, asked, tmp_path) -> None:
    odd = tiny(tmp_path / "odd", 203)
    told = "the head stays in half precision: the GPTQ layout packs 8 outputs in a word, and 203 don't fill them\n"
    err = run("quantize", str(odd), "out", "--no-report").err
    assert err.startswith(told)
    assert err.count("half precision") == 1
    assert "half precision" not in run("quantize", str(odd), "out", "--no-report", "--head-bits", "16").err


def test_rounding_takes_no_text_and_no_order(run, model, asked) -> None:
    assert run("quantize", str(model), "out", "--method", "rtn", "--no-report").code == 0
    assert asked == [(QuantConfig(), None)]


@pytest.mark.parametrize(
    ("flags", "code", "complaint"),
    [
        (["--method", "awq"], 2, "'awq' is not gptq or rtn"),
        (["--bits", "3"], 1, "bits is 3, expected 4 or 8"),
        (["--head-bits", "5"], 1, "head_bits is 5"),
        (["--text", "nowhere.txt"], 1, "can't read nowhere.txt"),
    ],
)
def test_wrong_flags_are_refused(flags, code, complaint, run, model, asked) -> None:
    result = run("quantize", str(model), "out", *flags)
    assert result.code == code
    assert complaint in result.err
    assert asked == []


def test_it_writes_a_checkpoint(run, model, tmp_path) -> None:
    result = run("quantize", str(model), str(tmp_path / "out"), "--method", "rtn", "--no-report")
    assert (result.code, result.out) == (0, f"{tmp_path / 'out'}\n")
    assert Checkpoint.open(tmp_path / "out").quant == QuantConfig(group_size=32)


def test_a_model_without_words_can_not_be_calibrated_on_text(run, model, tmp_path) -> None:
    result = run("quantize", str(model), str(tmp_path / "out"))
    assert result.code == 1
    assert "has no tokenizer" in result.err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused(run, model, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    result = run("quantize", str(model), str(tmp_path / "out"), "--method", "rtn")
    assert result.code == 1
    assert "exists already" in result.err


def test_the_report_measures_both_and_is_kept(run, api, asked, model, tmp_path, monkeypatch) -> None:
    loaded, measured = [], []

    class Loaded:
        def __enter__(self) -> Loaded:
            return self

        def __exit__(self, *exc: object) -> None: ...

    class Report:
        def save(self, folder: Path) -> None:
            (tmp_path / "report.json").write_text(json.dumps({"for": str(folder)}))

        def table(self) -> str:
            return "the table"

    def measure(reference, quantized, quant, text, **options) -> Report:
        measured.append((quant, text, options["text_name"], options["layer_errors"], options["calibration_sha256"]))
        return Report()

    def load(name: str, **options: object) -> Loaded:
        loaded.append((name, options))
        return Loaded()

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr(report, "measure_quality", measure)
    (tmp_path / "text.txt").write_text("some words\n")
    result = run("quantize", str(model), "out", "--text", str(tmp_path / "text.txt"))
    assert result.code == 0
    assert "the table" in result.err
    assert [name for name, _ in loaded] == [str(model), "out"]
    assert loaded[0][1]["quant"] == "none"
    quant, calibration = asked[0]
    assert calibration is not None
    assert measured == [(quant, "some words", "text.txt", {"transformer.h.0.mlp.w1": 0.04}, calibration.sha256)]
    assert json.loads((tmp_path / "report.json").read_text()) == {"for": "out"}
