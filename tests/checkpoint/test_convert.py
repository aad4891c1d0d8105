"""Out to other engines and back: the Qwen2 form, GGUF files, and what `--verify` says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from qwenlet.checkpoint import Checkpoint, convert, left_behind
from qwenlet.config import ModelConfig
from qwenlet.errors import CheckpointError, ConfigError
from qwenlet.gguf_header import read_header
from qwenlet.tokenizer import Tokenizer, read_folder
from qwenlet.tokenizer_export import Spelled, tokenizer_json
from qwenlet.verify import verify


@pytest.fixture
def source(tmp_path: Path, tiny: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("golden*"))
    return folder


@pytest.mark.parametrize("dynamic_rope", [False, True])
def test_the_qwen2_form_is_the_same_model_here_and_in_transformers(
    tmp_path: Path, source: Path, dynamic_rope: bool
) -> None:
    out = convert(source, tmp_path / "q2", to="qwen2", dynamic_rope=dynamic_rope)
    results = {result.program: result.comparison for result in verify(source, out)}
    assert set(results) == {"qwenlet", "transformers"}
    assert all(c.max_logit_error <= 1e-4 for c in results.values())
    raw = json.loads((out / "config.json").read_text())
    assert (raw["architectures"], raw["torch_dtype"]) == (["Qwen2ForCausalLM"], "float16")
    assert (raw["seq_length"], raw["use_dynamic_ntk"], raw["use_logn_attn"]) == (32, True, True)
    assert ("rope_parameters" in raw) is dynamic_rope


@pytest.mark.parametrize("name", ["q2", "x.gguf"])
def test_there_and_back_is_where_it_began(tmp_path: Path, source: Path, name: str) -> None:
    same = convert(source, tmp_path / "same")
    away = convert(source, tmp_path / name, to="gguf" if name.endswith("gguf") else "qwen2")
    back = convert(away, tmp_path / "back")
    assert (back / "config.json").read_bytes() == (same / "config.json").read_bytes()
    assert (back / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


@pytest.mark.parametrize("architecture", ["qwen", "qwen2"])
@pytest.mark.parametrize(("dtype", "divergence"), [("fp32", 1e-9), ("fp16", 1e-9), ("bf16", 2e-3), ("q8_0", 2e-2)])
def test_gguf_files_hold_the_model(
    tmp_path: Path, source: Path, architecture: str, dtype: str, divergence: float
) -> None:
    out = convert(source, tmp_path / "x.gguf", to="gguf", dtype=dtype, architecture=architecture)
    ours = next(result.comparison for result in verify(source, out) if result.program == "qwenlet")
    assert ours.divergence.mean <= divergence
    config = Checkpoint.open(out).config
    assert config.model_type == architecture
    assert (config.seq_length, config.use_dynamic_ntk, config.use_logn_attn) == (32, True, True)
    reader = GGUFReader(out)
    names = {tensor.name for tensor in reader.tensors}
    assert ("blk.0.attn_qkv.weight" in names) is (architecture == "qwen")
    assert ("blk.0.attn_q.weight" in names) is (architecture == "qwen2")


def test_a_q4_0_file_keeps_embedding_and_head_in_eight_bits(tmp_path: Path, source: Path) -> None:
    out = convert(source, tmp_path / "x.gguf", to="gguf", dtype="q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q8_0", "Q8_0")
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q4_0", "F32")


def test_the_vocabulary_goes_along_with_its_merges(tmp_path: Path, qwen_vocab: Path, golden: Path) -> None:
    """Every golden text gives the same ids through tokenizer.json, read by the `tokenizers` library."""
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers, which dev installs")
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    shutil.copyfile(qwen_vocab, folder / "qwen.tiktoken")
    vocabulary = read_folder(folder)
    raw, _ = tokenizer_json(vocabulary)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(raw))
    ours = Tokenizer(vocabulary)
    texts = ["", "你好，世界 123", "  def f(x):\n\treturn x\r\n", "<|im_start|>user\nhi<|im_end|>", "é é", "🙂‍↔️ ꙮ"]
    for text in [*texts, *_golden_texts(golden)]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text
    spelled = Spelled.of(vocabulary, 151_936)
    assert len(spelled.merges) == 151_643 - 256
    assert spelled.tokens[151_935] == "[PAD151935]"


def _golden_texts(golden: Path) -> list[str]:
    cases = json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 143
    return [case["text"] for case in cases]


def test_the_small_models_merges_come_back_as_they_were(demo_gguf: Path) -> None:
    from qwenlet.tokenizer_bytelevel import read_gguf

    metadata = read_header(demo_gguf).metadata
    assert Spelled.of(read_gguf(metadata, "demo")).merges == metadata["tokenizer.ggml.merges"]


def test_what_a_target_does_not_do_is_said(tiny: Path) -> None:
    config = ModelConfig.from_file(tiny)
    assert left_behind(config, "qwen") == []
    (sentence,) = left_behind(config, "gguf")
    assert "dynamic NTK and log-n attention" in sentence
    assert "llama.cpp" in sentence


def test_refusals_say_what_and_why(tmp_path: Path, source: Path, demo_gguf: Path) -> None:
    with pytest.raises(ConfigError, match="biases"):
        convert(demo_gguf, tmp_path / "a", to="qwen2")
    with pytest.raises(ConfigError, match="expected one of qwen, qwen2, gguf"):
        convert(source, tmp_path / "a", to="onnx")
    with pytest.raises(ConfigError, match="written in one of"):
        convert(source, tmp_path / "a.gguf", to="gguf", dtype="q6_k")
    with pytest.raises(ConfigError, match="architecture is for GGUF"):
        convert(source, tmp_path / "a", to="qwen2", architecture="qwen2")
    with pytest.raises(CheckpointError, match="no name for a GGUF"):
        convert(source, tmp_path / "a", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_verify_finds_another_model(tmp_path: Path, source: Path) -> None:
    out = convert(source, tmp_path / "out", to="qwen2")
    from safetensors.torch import load_file, save_file

    state = load_file(out / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * torch.tensor(1.01).half()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not the same model"):
        verify(source, out)
