"""The quality report: measured, written, read back, shown."""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qwenlet.config import QuantConfig
from qwenlet.errors import ConfigError, FormatError, RequestError
from qwenlet.ops import cpu
from qwenlet.quant.report import REPORT_FILE, QualityReport, built_in_text, measure_quality
from qwenlet.scoring import compare
from qwenlet.tokenizer import Tokenizer

QUANT = QuantConfig(group_size=64, method="gptq")


@dataclass
class Sizes:
    parameters: int
    weight_bytes: int


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text, allowed_special):
        assert allowed_special == set(), "text must not become control tokens"
        return list(text.encode())


class Model:
    """Logits are a random table of the current token, plus noise."""

    def __init__(self, name: str, weight_bytes: int, noise: float = 0.0) -> None:
        self.name, self.tokenizer, self.load_report = name, Bytes(), Sizes(1_000_000, weight_bytes)
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(256, 256, generator=generator)
        self.table += noise * torch.randn(256, 256, generator=generator)

    def logits(self, ids):
        return self.table[list(ids)]


@pytest.fixture
def report() -> QualityReport:
    return measure_quality(
        Model("plain", 2_000_000), Model("small", 562_500, noise=0.1), QUANT, "some text, and more of it " * 8,
        text_name="sample", window=32, limit=3, calibration=("words.txt", "ab" * 32),
        layer_errors={"h.0.attn.c_attn": 0.01, "h.0.mlp.c_proj": 0.07, "lm_head": 0.03},
    )  # fmt: skip


def test_a_report_says_what_was_measured_on_what(report):
    text = "some text, and more of it " * 8
    ids = list(text.encode())
    pieces = [ids[:32], ids[32:64], ids[64:96]]
    plain, small = Model("plain", 0), Model("small", 0, noise=0.1)
    assert report.measured == compare(plain.logits, small.logits, pieces)
    assert report.measured.divergence.mean > 0
    assert (report.reference, report.quantized, report.quant) == ("plain", "small", QUANT)
    assert (report.windows, report.window, report.text) == (3, 32, "sample")
    assert report.text_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert report.bits_per_weight == 4.5
    assert [name for name, _ in report.worst_layers] == ["h.0.mlp.c_proj", "lm_head", "h.0.attn.c_attn"]
    assert report.kernels.startswith(cpu.status().isa or "torch")


def test_windows_of_ids_need_no_tokenizer():
    plain, small = Model("plain", 1), Model("small", 1)
    plain.tokenizer = None
    found = measure_quality(plain, small, QUANT, [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert (found.windows, found.window, found.text) == (2, 4, "given")
    ids = b"".join(i.to_bytes(4, "little") for i in range(1, 9))
    assert found.text_sha256 == hashlib.sha256(ids).hexdigest()


def test_the_built_in_text_is_a_few_thousand_tokens_in_two_languages(qwen_vocab):
    text = built_in_text()
    ids = Tokenizer.from_file(qwen_vocab).encode(text, allowed_special=set())
    assert len(ids) > 4 * 512
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in text)
    assert 0.1 < chinese / len(text) < 0.5
    found = measure_quality(Model("plain", 1), Model("small", 1), QUANT, limit=2)
    assert (found.text, found.windows) == ("built-in", 2)


def test_a_text_below_one_window_is_refused():
    with pytest.raises(RequestError, match="one window needs 512"):
        measure_quality(Model("plain", 1), Model("small", 1), QUANT, "short")


# ------------------------------------------------------------------------------------------------------------- files


def test_json_there_and_back(report, tmp_path):
    path = report.save(tmp_path)
    assert path == tmp_path / REPORT_FILE
    assert [file.name for file in tmp_path.iterdir()] == [REPORT_FILE]
    assert QualityReport.load(tmp_path) == report
    raw = json.loads(path.read_text())
    assert raw["bits_per_weight"] == 4.5
    assert raw["measured"]["divergence"]["mean"] == report.measured.divergence.mean
    assert raw["quant"]["group_size"] == 64
    bare = replace(report, calibration=None, calibration_sha256=None, layer_errors={}, quant=QuantConfig())
    assert QualityReport.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare


def test_damage_is_named(report, tmp_path):
    raw = report.to_dict()

    def message(**changes):
        with pytest.raises(FormatError) as error:
            QualityReport.from_dict(raw | changes)
        return error.value.message

    assert "unknown colour" in message(colour="red")
    assert "windows is 'three', expected int" in message(windows="three")
    assert "windows is True, expected int" in message(windows=True)
    assert "calibration_sha256 is 5, expected str or null" in message(calibration_sha256=5)
    assert "measured is 'good', expected an object" in message(measured="good")
    assert "layer_errors: h is None, expected float" in message(layer_errors={"h": None})
    assert "layer_errors is [], expected an object" in message(layer_errors=[])
    assert "bits is 3" in message(quant=raw["quant"] | {"bits": 3})
    assert "method is 'magic'" in message(quant=raw["quant"] | {"method": "magic"})
    with pytest.raises(FormatError, match="missing windows"):
        QualityReport.from_dict({name: value for name, value in raw.items() if name != "windows"})
    with pytest.raises(ConfigError, match="does not exist"):
        QualityReport.load(tmp_path)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10))  # fmt: skip
def test_wild_json_is_a_format_error(wild):
    fields = QualityReport.__dataclass_fields__
    with pytest.raises(FormatError):
        QualityReport.from_dict(dict.fromkeys(fields, wild))


# ------------------------------------------------------------------------------------------------------------ screen


def shown(report: QualityReport) -> str:
    out = io.StringIO()
    Console(file=out, width=160, markup=False).print(report.table())
    return out.getvalue()


def test_the_table_for_people(report):
    text = shown(report)
    for expected in ("plain", "small", "perplexity", "KL divergence", "99 %", "same likeliest token",
                     "2.0 MB, 16.00 bits each", "0.6 MB, 4.50 bits each", "7.00 %  h.0.mlp.c_proj",
                     "sample, sha256 " + report.text_sha256[:12], "words.txt, sha256 abababababab"):  # fmt: skip
        assert expected in text, expected
    change = 100 * (report.measured.other.value / report.measured.reference.value - 1)
    assert f"({change:+.2f} %)" in text
    assert math.isfinite(change)


def test_a_table_without_calibration_and_layers_and_with_brackets_in_a_name(report):
    text = shown(replace(report, calibration_sha256=None, layer_errors={}, quantized="[red]small[/]"))
    assert "none" in text
    assert "worst layers" not in text
    assert "[red]small[/]" in text
