"""`qwenlet finetune` and `pretrain`: from a file of examples to something that chats, and what they say on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.train.tiny import TINY

from qwenlet.api import load
from qwenlet.checkpoint import Checkpoint, write_random
from qwenlet.errors import CheckpointError
from qwenlet.lora import Adapter
from qwenlet.lora.merge import merge

ARGUMENTS = ["--epochs", "2", "--accumulation", "1", "--batch-size", "4", "--max-length", "64", "--dtype", "fp32"]


@pytest.fixture
def model(tmp_path: Path, qwen_vocab: Path) -> Path:
    from dataclasses import replace

    return write_random(tmp_path / "tiny", replace(TINY, vocab_size=151_936), dtype="fp32", tokenizer_file=qwen_vocab)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [{"instruction": f"Count to {n}", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 13)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_an_adapter_out_of_examples(run, model: Path, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = run("finetune", str(model), str(data), "--out", str(out), "--rank", "4", "--held-out", "2", *ARGUMENTS)
    assert (result.code, result.out) == (0, f"{out}\n")
    assert "12 alpaca: 12 samples" in result.err
    assert "parameters learn" in result.err
    assert "held-out loss" in result.err
    adapter = Adapter.read(out, Checkpoint.open(model).config)
    assert len(adapter.factors) == 2 * 5
    training = out / "training"
    assert (training / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((training / "tensorboard").iterdir())
    steps = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, len(steps) - 2))
    assert (sorted(training.glob("step-*"))[-1] / "export" / "adapter_model.safetensors").exists()
    again = run("finetune", str(model), str(data), "--out", str(out))
    assert again.code == 1
    assert "holds a finished model already" in again.err


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_an_adapter_beside_codes(run, data: Path, tmp_path: Path, qwen_vocab: Path, dtype: str):
    from dataclasses import replace

    sizes = replace(TINY, vocab_size=151_936, hidden_size=64, head_dim=32, intermediate_size=128)
    model = write_random(tmp_path / "tiny", sizes, dtype="fp32", tokenizer_file=qwen_vocab)
    out = tmp_path / "out"
    result = run(
        "finetune", str(model), str(data), "--out", str(out), "--method", "qlora", "--rank", "8", "--lr", "0.02",
        "--checkpointing", "products", "--held-out", "2", *ARGUMENTS[:-1], dtype,
    )  # fmt: skip
    assert result.code == 0, result.err
    log = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert held_out[-1] < held_out[0] - 0.05
    assert len(Adapter.read(out, Checkpoint.open(model).config).factors) == 2 * 5
    other = run("finetune", str(model), str(data), "--out", "x", "--method", "qlora", *ARGUMENTS[:-1], "fp16")
    assert other.code == 1
    assert "dtype is 'fp16'" in other.err


def test_a_run_beside_codes_goes_on_beside_the_same(run, data: Path, tmp_path: Path, qwen_vocab: Path):
    from dataclasses import replace

    sizes = replace(TINY, vocab_size=151_936, hidden_size=64, head_dim=32, intermediate_size=128)
    model = write_random(tmp_path / "tiny", sizes, dtype="fp32", tokenizer_file=qwen_vocab)
    out = tmp_path / "out"
    command = ["finetune", str(model), str(data), "--out", str(out), "--method", "qlora", "--max-steps", "1"]
    assert run(*command, *ARGUMENTS).code == 0
    (out / "adapter_config.json").unlink()  # as if it had been stopped
    other = run(*command, "--quant", "int8", *ARGUMENTS)
    assert other.code == 1
    assert "quant 'int4' then, 'int8' now" in other.err


def test_what_was_left_out_of_evaluation_data_is_said(run, model: Path, data: Path, tmp_path: Path):
    other = tmp_path / "other.jsonl"
    records = [{"instruction": "Hi", "output": "Ho"}, {"instruction": "Hi", "output": "Ho " * 100}]
    other.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    result = run("finetune", str(model), str(data), "--out", str(tmp_path / "out"), "--eval-data", str(other),
                 "--dry-run", *ARGUMENTS)  # fmt: skip
    assert result.code == 0, result.err
    assert "to measure on: 1 record longer than 64 tokens left out" in result.err


def test_memory_is_told_before_weights_are_loaded(
    run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object, **__: object) -> None:
        raise CheckpointError("killed")

    monkeypatch.setattr("qwenlet.train.finetune.load_model", killed)
    monkeypatch.setattr("qwenlet.train.planning.free_memory", lambda device: 1000)
    command = ["finetune", str(model), str(data), "--out", str(tmp_path / "out"), *ARGUMENTS]
    told = run(*command, "--dry-run")
    assert told.code == 1
    assert "expected peak" in told.err
    assert told.err.index("that is more than the") < told.err.index("killed")
    shown = run(*command, "--preview", "1")
    assert shown.code == 0, shown.err
    assert "[[1<|im_end|>]]" in shown.out


def test_all_weights_become_a_checkpoint(run, model: Path, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = run(
        "finetune", str(model), str(data), "--out", str(out), "--method", "full", "--max-steps", "2", *ARGUMENTS
    )
    assert result.code == 0, result.err
    trained = Checkpoint.open(out)
    assert trained.config == Checkpoint.open(model).config
    assert (out / "qwen.tiktoken").exists()
    assert (out / "generation_config.json").exists()


def test_a_base_model_becomes_one_that_chats(run, model: Path, data: Path, tmp_path: Path):
    generation = model / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"chat_format": "raw"}))
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Nobody speaks in here."}) + "\n")
    full, adapter, merged, read = (tmp_path / name for name in ("full", "adapter", "merged", "read"))
    few = ["--max-steps", "1", *ARGUMENTS]
    for out, source, method in ((full, data, "full"), (adapter, data, "lora"), (read, text, "full")):
        result = run("finetune", str(model), str(source), "--out", str(out), "--method", method, *few)
        assert result.code == 0, result.err
        untaught = "--modules-to-save wte --modules-to-save lm_head" in result.err
        assert untaught == (method == "lora")
    merge(model, adapter, merged)
    chats = {path.name: Checkpoint.open(path).defaults.chat_format for path in (model, full, merged, read)}
    assert chats == {"tiny": "raw", "full": "chatml", "merged": "chatml", "read": "raw"}
    with load(model, device="cpu", dtype="fp32", max_context=128) as llm:
        assert llm.chat_format == "raw"
        llm.add_adapter("chatty", adapter)
        assert llm.chat_format == "chatml"
        assert llm.tokenizer.im_end_id in llm.engine.stop_ids, "or its turns would never end"
        llm.remove_adapter("chatty")
        assert llm.chat_format == "raw"


def test_a_preview_shows_what_is_learned_and_trains_nothing(run, model: Path, data: Path, tmp_path: Path):
    result = run("finetune", str(model), str(data), "--out", str(tmp_path / "out"), "--preview", "1")
    assert result.code == 0, result.err
    assert "<|im_start|>user\nCount to 1<|im_end|>" in result.out
    assert "[[1<|im_end|>]]" in result.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--method", "magic"], "method is 'magic'"),
        (["--schedule", "up"], "schedule is 'up', expected one of cosine"),
        (["--epochs", "0"], "epochs is 0.0, expected more than 0"),
        (["--patience", "2"], "nothing is measured"),
        (["--targets", "nonsense"], "nonsense"),
    ],
)
def test_wrong_options_are_named(run, model: Path, data: Path, tmp_path: Path, arguments: list[str], why: str):
    result = run("finetune", str(model), str(data), "--out", str(tmp_path / "out"), *arguments)
    assert result.code == 1
    assert why in result.err


def test_a_model_from_nothing(run, tmp_path: Path, qwen_vocab: Path):
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"The {n} foxes sleep." for n in range(40)), encoding="utf-8")
    out = tmp_path / "out"
    result = run(
        "pretrain", str(text), "--out", str(out), "--tokenizer", str(qwen_vocab), "--vocabulary", "512",
        "--layers", "2", "--hidden", "32", "--heads", "2", "--inner", "48", "--length", "32", "--epochs", "3",
        "--batch-size", "4",
        "--accumulation", "1", "--dtype", "fp32", "--prompt", "The", "--held-out", "0.1",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "by counts alone" in result.err
    config = Checkpoint.open(out).config
    assert (config.model_type, config.vocab_size, config.seq_length) == ("qwen", 512, 32)
    assert Checkpoint.open(out).defaults.chat_format == "raw", "it has read, and never talked"


def test_orders_of_counts(run, tmp_path: Path):
    from qwenlet.cli.pretrain import _orders

    assert (_orders(["none"]), _orders(["1", "4"])) == ((), (1, 4))
    result = run("pretrain", "x.txt", "--out", str(tmp_path), "--tokenizer", "x", "--baseline", "two")
    assert result.code == 2
    assert "'two' is no order: expected 1 or more, or none" in result.err
