"""Loading: what was asked for, what is there, and what becomes of the weights between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import qwenlet
from qwenlet import SamplingParams
from qwenlet.checkpoint import Checkpoint, write_rounded
from qwenlet.errors import ConfigError, FormatError, HubError
from qwenlet.ops import cpu

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "smollm2.json").read_text(encoding="utf-8"))["chat"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def llm(demo_gguf: Path) -> Iterator[qwenlet.LLM]:
    with qwenlet.load(str(demo_gguf), dtype="fp32", device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Iterator[qwenlet.LLM]:
    """The golden Qwen-1, which has no vocabulary."""
    with qwenlet.load(str(golden / "tiny-qwen"), dtype="fp32", device="cpu") as llm:
        yield llm


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": "int3"}, "int3"),
        ({"device": "tpu0"}, "tpu0"),
        ({"device": "cuda:9"}, "cuda"),
        ({"quant": "int2"}, "quant"),
        ({"kv_cache": "int7"}, "kv_cache"),
        ({"max_context": -1}, "max_context"),
        ({"max_contexts": 5}, "did you mean 'max_context'"),
        ({"attention": "efficient"}, "efficient"),
    ],
)
def test_options_are_refused_by_name(golden: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        qwenlet.load(str(golden / "tiny-qwen"), **({"device": "cpu"} | options))


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(HubError):
        qwenlet.load(str(tmp_path / "nothing"), offline=True)
    with pytest.raises(HubError, match="Qwen/Qwen-1_8B-Nope"):
        qwenlet.load("Qwen/Qwen-1_8B-Nope", offline=True)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"<html>not a model</html>")
    with pytest.raises(FormatError, match="not a GGUF"):
        qwenlet.load(str(junk))


def test_no_file_of_a_checkpoint_is_executed(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-code"
    shutil.copytree(golden / "tiny-qwen", folder)
    mark = tmp_path / "executed"
    for name in ("modeling_qwen.py", "configuration_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
    with qwenlet.load(str(folder), device="cpu") as llm:
        llm.generate([1, 2], SamplingParams(max_new_tokens=2))
    assert not mark.exists()


def test_the_dtype_follows_the_device_the_model_lives_on(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code asked "is a GPU present" and then failed on the CPU with 'addmm_impl_cpu_'."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with qwenlet.load(str(golden / "tiny-qwen"), device="cpu") as llm:
        assert llm.dtype in (torch.bfloat16, torch.float32)
        assert "this processor" in str(llm.load_report)


# ------------------------------------------------------------------------------------------------------- quantization


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWENLET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def close_to(logits: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((logits - reference).norm() < 0.05 * reference.norm())


def test_quantized_tensors_of_a_gguf_run_as_they_are(
    llm: qwenlet.LLM, demo_gguf: Path, reference: dict[str, Any]
) -> None:
    with qwenlet.load(str(demo_gguf), device="cpu", quant="stored") as quantized:
        assert quantized.load_report.dtype == "int4 and int8"
        assert quantized.dtype == torch.float32
        assert quantized.options.kv_cache == "int8"
        exact, ours = llm.logits(reference["ids"]), quantized.logits(reference["ids"])
        # activations of eight bits; bfloat16 costs 0.002
        assert F.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean") < 0.02
        assert "Paris" in quantized.chat(QUESTION, system=quantized.default_system)[0]


def test_without_kernels_codes_become_floats(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = write_rounded(Checkpoint.open(golden / "tiny-qwen"), tmp_path / "q", qwenlet.QuantConfig())
    with qwenlet.load(str(saved), device="cpu") as codes:
        assert (codes.load_report.dtype == "int4") == (cpu.status().isa is not None)
    monkeypatch.setenv("QWENLET_ISA", "torch")
    with qwenlet.load(str(saved), device="cpu", dtype="auto") as floats:
        assert floats.load_report.dtype in ("bfloat16", "float32")
        assert close_to(floats.logits([1, 2, 3]).float(), qwenlet_logits(saved))


def qwenlet_logits(saved: Path) -> torch.Tensor:
    with qwenlet.load(str(saved), device="cpu", quant="none", dtype="fp32") as floats:
        return floats.logits([1, 2, 3])


def test_stored_needs_codes_and_a_cpu(golden: Path, demo_gguf: Path) -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        qwenlet.load(str(golden / "tiny-qwen"), quant="stored", device="cpu")
    with pytest.raises(ConfigError, match="no dtype but fp32"):
        qwenlet.load(str(demo_gguf), quant="stored", dtype="bf16", device="cpu")


def test_a_small_gguf_runs_in_floats_unless_asked(demo_gguf: Path) -> None:
    with qwenlet.load(str(demo_gguf), device="cpu", max_context=64) as floats:
        assert floats.load_report.dtype in ("bfloat16", "float32")


def test_a_dtype_or_none_makes_floats_of_them(llm: qwenlet.LLM, demo_gguf: Path) -> None:
    assert llm.load_report.dtype == "float32", "the fixture asks for dtype='fp32'"
    assert llm.options.kv_cache == "fp32"
    with qwenlet.load(str(demo_gguf), device="cpu", quant="none", max_context=64) as floats:
        assert floats.load_report.dtype in ("bfloat16", "float32")


def test_quant_rounds_once_and_keeps_the_result(tiny: qwenlet.LLM, golden: Path, cache: Path) -> None:
    ids = list(range(20))
    with qwenlet.load(str(golden / "tiny-qwen"), quant="int8", device="cpu") as first:
        assert close_to(first.logits(ids), tiny.logits(ids))
        assert "rounded, and kept in" in str(first.load_report)
        assert first.path == golden / "tiny-qwen", "the model is still the one that was named"
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    with qwenlet.load(str(golden / "tiny-qwen"), quant="int8", device="cpu") as second:
        assert second.load_report.kept
        assert torch.equal(second.logits(ids), unkept_logits(golden, ids))
    assert kept.stat().st_mtime_ns == before


def unkept_logits(golden: Path, ids: list[int]) -> torch.Tensor:
    quant = qwenlet.QuantConfig.named("int8")
    with qwenlet.load(str(golden / "tiny-qwen"), quant=quant, device="cpu", tile_cache=False) as again:
        assert not again.load_report.kept
        return again.logits(ids)


def test_without_a_cache_it_is_rounded_in_memory(
    tiny: qwenlet.LLM, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWENLET_CACHE", str(tmp_path / "file"))
    with qwenlet.load(str(golden / "tiny-qwen"), quant="int8", device="cpu", kv_cache="fp32") as llm:
        assert "repacked anew at each start" in str(llm.load_report)
        assert llm.options.kv_cache == "fp32"
        assert close_to(llm.logits([1, 2, 3]), tiny.logits([1, 2, 3]))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"quant": 4}, "quant is 4"),
        ({"quant": "int4", "dtype": "bf16"}, "compute in fp32"),
        ({"quant": qwenlet.QuantConfig(group_size=128)}, "groups of 128 do not divide the 64 inputs"),
        ({"quant": qwenlet.QuantConfig(method="gptq")}, "rounded to nearest"),
    ],
)
def test_what_quant_cant_mean(golden: Path, cache: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        qwenlet.load(str(golden / "tiny-qwen"), device="cpu", **options)
