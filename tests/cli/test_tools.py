"""The smaller verbs: pull, tokenize, vocab, random, convert, doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenlet import hub
from qwenlet.cli import console, doctor
from qwenlet.config import QuantConfig, qwen_1_8b
from qwenlet.ops import cpu


@pytest.fixture
def model(golden) -> str:
    return str(golden / "tiny-qwen")


# ------------------------------------------------------------------------------------------------------------ pull


def test_pull_prints_the_path_and_sums_up(run, monkeypatch):
    calls = []

    def pull(name, *, progress, **options):
        progress(1, 2, "weights")
        calls.append((name, options))
        return hub.Pulled(Path("/models/x"), "abc123", 3, 3_674_000_000, 1_200_000)

    monkeypatch.setattr(hub, "pull", pull)
    result = run("pull", "some/model", "--revision", "main", "--source", "modelscope")
    assert result.out == "/models/x\n"
    assert result.err == "some/model at abc123: 3 files, 3.7 GB, 1.2 MB fetched\n"
    assert calls == [("some/model", {"revision": "main", "source": "modelscope"})]


def test_pull_of_a_local_file_fetches_nothing(run, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = run("pull", str(tmp_path / "model.gguf"))
    assert result.out == f"{tmp_path}/model.gguf\n"
    assert "1 file, 4 bytes, nothing to fetch" in result.err


def test_pull_offline_is_refused(run):
    result = run("pull", "some/model", "--offline")
    assert result.code == 1
    assert "going online is forbidden" in result.err


def test_sizes():
    assert [console.size(n) for n in (0, 999, 1000, 98_000_000, 3_673_657_344)] == [
        "0 bytes", "999 bytes", "1.0 kB", "98.0 MB", "3.7 GB",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- tokenize


def test_tokens_of_a_text(run, qwen_vocab):
    assert run("tokenize", str(qwen_vocab), "你好, you").out == "108386\t'你好'\n11\t','\n498\t' you'\n"
    assert run("tokenize", str(qwen_vocab), stdin="你好\n".encode()).out == "108386\t'你好'\n"
    assert run("tokenize", str(qwen_vocab), "--count", "hello world").out == "2\n"


def test_half_a_character_is_shown_as_bytes(run, qwen_vocab):
    assert run("tokenize", str(qwen_vocab), " 根").out == "51461\tb' \\xe6\\xa0'\n117\tb'\\xb9'\n"


def test_control_tokens_are_text_unless_asked_for(run, qwen_vocab):
    plain = json.loads(run("tokenize", str(qwen_vocab), "a<|im_end|>", "--json").out)
    special = json.loads(run("tokenize", str(qwen_vocab), "a<|im_end|>", "--json", "--special").out)
    assert plain["count"] > 2
    assert special == {
        "count": 2,
        "ids": [64, 151645],
        "pieces": [
            {"id": 64, "text": "a", "hex": "61"},
            {"id": 151645, "text": "<|im_end|>", "hex": b"<|im_end|>".hex()},
        ],
    }


def test_ids_become_text(run, qwen_vocab):
    assert run("tokenize", str(qwen_vocab), "--ids", "[108386, 51461 117]").out == "你好 根\n"
    assert "'x' is not a token id" in run("tokenize", str(qwen_vocab), "--ids", "1 x").err
    assert "out of range" in run("tokenize", str(qwen_vocab), "--ids", "9999999").err


def test_a_gguf_brings_its_vocabulary(run, demo_gguf):
    assert run("tokenize", str(demo_gguf), "--count", "Hello, world!").out == "4\n"


def test_what_is_no_vocabulary_is_an_error(run, model, tmp_path):
    assert "has no tokenizer" in run("tokenize", model, "x").err
    assert "no such file" in run("tokenize", "./nowhere", "x").err
    assert "there is no text" in run("tokenize", model).err


# ----------------------------------------------------------------------------------------------------------- vocab


def test_vocab_extend(run, qwen_vocab, tmp_path):
    words, out = tmp_path / "words.txt", tmp_path / "qwen_extra.tiktoken"
    words.write_text("我是一只猫\t20\n你是一只猫\t10\n他是一只猫\t5\n一只\t200\n一只猫\t100\n夸张的 比喻手法\t20\n")
    command = ["vocab", "extend", str(words), "--tokenizer", str(qwen_vocab), "--out", str(out)]
    result = run(*command)
    assert result.out == f"{out}\n"
    assert "left out '一只': it is the token" in result.err
    assert "6 new tokens with ids 151851 to 151856" in result.err
    assert len(out.read_text().splitlines()) == 6

    again = run(*command)
    assert again.code == 1
    assert "exists already" in again.err
    assert run(*command, "--force", "--start-id", "151900").code == 0


def test_vocab_without_a_new_word_writes_nothing(run, qwen_vocab, tmp_path):
    words, out = tmp_path / "words.txt", tmp_path / "extra"
    words.write_text("一只\n")
    result = run("vocab", "extend", str(words), "--tokenizer", str(qwen_vocab), "--out", str(out))
    assert result.code == 1
    assert "no word that could be added" in result.err
    assert not out.exists()


# -------------------------------------------------------------------------------------------- random and convert


def test_random_takes_the_shape_and_passes_what_was_asked(run, monkeypatch, tmp_path):
    from qwenlet import checkpoint

    calls = []

    def write_random(out, config, *, progress, **options):
        progress(1, 2, "wte")
        calls.append((config, options))
        return out

    monkeypatch.setattr(checkpoint, "write_random", write_random)
    result = run("random", str(tmp_path / "r"), "--layers", "2", "--seed", "0")
    assert result.out == f"{tmp_path}/r\n"
    assert "in 2 layers" in result.err
    run("random", str(tmp_path / "r"))
    (short, options), (full, _) = calls
    assert (short.num_hidden_layers, options) == (2, {"seed": 0})
    assert full == qwen_1_8b()
    assert run("random", str(tmp_path / "r"), "--like", "gpt").code == 2


def test_convert_writes_a_folder_that_opens(run, model, tmp_path):
    from qwenlet.checkpoint import Checkpoint

    result = run("convert", model, str(tmp_path / "out"), "--to", "qwen", "--dtype", "fp32")
    assert result.out == f"{tmp_path}/out\n", result.err
    assert Checkpoint.open(tmp_path / "out").config == Checkpoint.open(Path(model)).config
    assert "exists already" in run("convert", model, str(tmp_path / "out"), "--to", "qwen").err
    assert run("convert", model, str(tmp_path / "other"), "--to", "onnx").code == 1


# ---------------------------------------------------------------------------------------------------------- doctor


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    for name in ("QWENLET_CACHE", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("QWENLET_OFFLINE", "1")


def test_doctor_tells_what_the_deciding_code_says(run, model, empty_cache):
    import torch

    from qwenlet.checkpoint import auto_dtype, dtype_name
    from qwenlet.linear import choose_linear

    result = run("doctor", model, "--json")
    assert result.code == 0, result.out
    facts = json.loads(result.out)
    assert list(facts) == ["software", "machine", "precision", "kernels", "models", "model"]
    dtype, why = auto_dtype(torch.device("cpu"))
    assert facts["precision"]["auto on cpu"] == {"value": dtype_name(dtype), "why": why}
    _, why = choose_linear("auto", torch.device("cpu"), torch.bfloat16)
    assert facts["kernels"]["bf16 linears, cpu"]["why"] == why
    assert "math" in facts["kernels"]["attention, cpu"]["value"]
    assert facts["models"]["network"]["value"] is False
    assert facts["model"]["type"]["value"] == "qwen"


def test_doctor_for_people(run, empty_cache):
    result = run("doctor")
    assert result.code == 0, result.out
    for title in ("Software", "Machine", "Precision", "Kernels", "Models"):
        assert title in result.out
    assert "forbidden" in result.out


def test_doctor_goes_on_where_something_is_broken(run, monkeypatch, empty_cache):
    def broken():
        raise OSError("libgomp.so.1: cannot open shared object file")
        yield

    monkeypatch.setattr(doctor, "_kernels", broken)
    result = run("doctor", "some/model")
    assert result.code == 1
    assert "OSError: libgomp.so.1" in result.out
    assert "some/model is not complete" in result.out
    assert "Precision" in result.out


def test_doctor_plans_the_model_as_it_would_run(run, empty_cache, tmp_path):
    """A published Int4 folder is no model in bfloat16."""
    quant = QuantConfig(group_size=128, head_bits=None, embedding_bits=None, method="gptq")
    config = qwen_1_8b().to_published() | {"fp16": True, "quantization_config": quant.to_published()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(run("doctor", str(tmp_path), "--json").out)["model"]
    planned = json.loads(run("plan", str(tmp_path), "--json").out)
    assert found["needs"]["value"] == planned["peak"] < 3e9
    assert found["weights"]["value"] == "int4 in groups of 128, head bf16, embedding fp16"


def test_doctor_says_where_shapes_fall_back(run, model, empty_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "status", lambda: cpu.Status("avx2", "as a test says"))
    config = json.loads((Path(model) / "config.json").read_text())
    for size, runs, why in ((320, True, ""), (144, False, "hidden sizes 64 and 72 are not multiples of 16")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": size}))
        fact = json.loads(run("doctor", str(tmp_path), "--json").out)["model"]["forward pass"]
        assert fact == {"value": runs, "why": why}
