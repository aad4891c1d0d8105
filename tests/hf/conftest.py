"""Folders as published, with code in them that would leave a mark if anybody ran it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hf.trap import trap
from qwenlet.checkpoint import write_random
from qwenlet.config import ModelConfig


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    return ModelConfig(
        model_type="qwen", vocab_size=151_936, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, intermediate_size=32, max_position_embeddings=8192, seq_length=8192,
        use_dynamic_ntk=True, use_logn_attn=True, eos_token_ids=(151_643,),
    )  # fmt: skip


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, small: ModelConfig, qwen_vocab: Path) -> Path:
    """A chat model of random weights with the published vocabulary and files."""
    folder = write_random(tmp_path_factory.mktemp("hf") / "chat", small, dtype="fp32", tokenizer_file=qwen_vocab)
    config = folder / "tokenizer_config.json"
    raw = json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}
    config.write_text(json.dumps(raw))
    return trap(folder)


@pytest.fixture
def tiny_folder(tmp_path: Path, golden: Path) -> Path:
    folder = tmp_path / "tiny"
    shutil.copytree(golden / "tiny-qwen", folder, ignore=shutil.ignore_patterns("golden*"))
    return trap(folder)


@pytest.fixture(autouse=True)
def repeatable() -> None:
    torch.manual_seed(0)
