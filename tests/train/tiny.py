"""Small models, samples and runs that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenlet.config import ModelConfig, TrainingConfig
from qwenlet.model import Qwen
from qwenlet.train.objective import NextToken
from qwenlet.train.samples import Report, Samples
from qwenlet.train.trainer import Trainer

CPU = torch.device("cpu")
TINY = ModelConfig(
    model_type="qwen", vocab_size=271, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=64, seq_length=64,
    use_dynamic_ntk=True, use_logn_attn=True,
)  # fmt: skip


def tiny_model(seed: int = 0, **changes: Any) -> Qwen:
    """Its weights are far from an optimum, and all of them learn."""
    torch.manual_seed(seed)
    model = Qwen(ModelConfig(**(vars(TINY) | changes)))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "ln_" in name else 0.0, std=0.1)
    return model.train()


def made_samples(count: int = 24, *, seed: int = 0, longest: int = 20) -> Samples:
    """Counting upwards from a random start, which is easy to learn."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, longest, count)
    ids = [(draw.integers(0, 200) + np.arange(length)) % 250 for length in lengths]
    learned = [np.arange(length) >= 2 for length in lengths]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    where = tuple(f"made.jsonl:{index + 1}" for index in range(count))
    return Samples(np.concatenate(ids).astype(np.int32), np.concatenate(learned), starts, where, Report())


def trainer(out: Path, model: Qwen | None = None, **changes: Any) -> Trainer:
    """A run over made samples."""
    options = {
        name: changes.pop(name) for name in ("held_out", "export", "progress", "note", "group") if name in changes
    }
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 1, "accumulation": 2, "warmup": 2, "seed": 3}
    dtype = changes.pop("arithmetic", torch.float32)
    config = TrainingConfig(**(settings | changes))
    return Trainer(
        model or tiny_model(), NextToken(made_samples()), config, lr=config.lr or 1e-2, dtype=dtype, device=CPU,
        out=out, run={"seed": config.seed}, budget=40 if config.packed else None, **options,
    )  # fmt: skip
