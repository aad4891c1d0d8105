"""A tiny random Qwen whose vocabulary is single bytes, and small data folders in the published layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import qwenlet
from qwenlet import checkpoint
from qwenlet.config import qwen_1_8b
from qwenlet.evals.data import DataFolder
from qwenlet.evals.task import Bench
from qwenlet.pretokenizer import QWEN
from qwenlet.tokenizer_export import tokenizer_json
from qwenlet.tokenizer_formats import Vocabulary

SHAPE = replace(
    qwen_1_8b(),
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
)


@pytest.fixture(scope="session")
def byte_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, with a vocabulary of single bytes and control tokens behind them."""
    folder = checkpoint.write_random(tmp_path_factory.mktemp("models") / "byte-qwen", SHAPE, dtype="fp32")
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    files = tokenizer_json(Vocabulary(ranks, special, QWEN, 259, "single bytes"))
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), files, strict=True):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def llm(byte_qwen: Path) -> Iterator[qwenlet.LLM]:
    with qwenlet.load(str(byte_qwen), device="cpu", dtype="fp32", max_context=4096) as llm:
        yield llm


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    return DataFolder(tmp_path / "data", unchecked=True)


@pytest.fixture
def bench(llm: qwenlet.LLM, data: DataFolder) -> Bench:
    return Bench(data, llm.tokenizer, llm.context_length, llm.config)
