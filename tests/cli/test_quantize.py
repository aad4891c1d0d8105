"""`qwenlet quantize`: what its flags ask for, what it writes, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwenlet import api as real_api
from qwenlet.checkpoint import Checkpoint, write_random
from qwenlet.cli import console
from qwenlet.cli import quantize as verb
from qwenlet.config import QuantConfig, qwen_1_8b
from qwenlet.pretokenizer import QWEN
from qwenlet.quant import pipeline, report
from qwenlet.quant.calibration import Calibration
from qwenlet.quant.pipeline import Outcome
from qwenlet.quant.workfolder import WeightError
from qwenlet.tokenizer_export import tokenizer_json
from qwenlet.tokenizer_formats import Vocabulary


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
        (["--no-desc-act", "--static-groups"], {"desc_act": False, "static_groups": True}),
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
        (["--method", "rtn", "--static-groups"], 2, "--static-groups: only --method gptq looks"),
        (["--method", "rtn", "--calibration", "english"], 2, "--calibration: only --method gptq looks"),
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
        measured.append((quant, text, options["text_name"], options["layer_errors"], options["calibration"]))
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
    assert measured == [
        (quant, "some words", "text.txt", {"transformer.h.0.mlp.w1": 0.04}, ("builtin", calibration.sha256))
    ]
    assert json.loads((tmp_path / "report.json").read_text()) == {"for": "out"}


@pytest.fixture
def talking(tmp_path) -> Path:
    """A model with a vocabulary of single bytes."""
    path = tiny(tmp_path / "talking", 256)
    ranks = {bytes([byte]): byte for byte in range(256)}
    files = tokenizer_json(Vocabulary(ranks, {}, QWEN, 256, "single bytes"))
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), files, strict=True):
        (path / name).write_text(json.dumps(content))
    return path


def test_a_text_that_fills_no_window_is_refused_before_anything_starts(run, talking, asked, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("some words\n")
    result = run("quantize", str(talking), "out", "--text", str(tmp_path / "text.txt"))
    assert result.code == 1
    assert "the text has 10 tokens, but one window needs 512" in result.err
    assert asked == []


def test_a_report_that_was_interrupted_is_made_by_the_same_command(run, api, talking, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    (tmp_path / "text.txt").write_text("some words " * 50)
    command = ("quantize", str(talking), str(out), "--method", "rtn", "--text", str(tmp_path / "text.txt"))

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "load", stop)
    result = run(*command)
    assert result.code == console.INTERRUPTED
    assert "OUT is written: the same command makes the report" in result.err
    weights = (out / "model.safetensors").stat().st_mtime_ns

    monkeypatch.setattr(api, "load", real_api.load)
    result = run(*command)
    assert result.code == 0, result.err
    assert "is written already, and only its report is missing" in result.err
    assert (out / "model.safetensors").stat().st_mtime_ns == weights
    made = report.QualityReport.load(out)
    assert set(made.layer_errors) == {
        "lm_head", *(f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"))
    }  # fmt: skip
    assert (made.windows, made.calibration) == (1, "built-in samples")
    assert "exists already" in run(*command).err, "nothing is missing now"
