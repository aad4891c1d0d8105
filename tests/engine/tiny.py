"""Small random models of every kind of weights, and a tokenizer of single bytes for them."""

from __future__ import annotations

import torch
from torch import nn

from qwenlet.config import EngineConfig, GenerationDefaults
from qwenlet.engine import Engine
from qwenlet.linear import QuantLinear, TiledLinear, replace_linear
from qwenlet.model import Qwen
from qwenlet.ops import cpu
from qwenlet.ops.packing import to_tiles
from qwenlet.ops.rounding import round_to_nearest
from qwenlet.pretokenizer import QWEN
from qwenlet.tokenizer import Tokenizer
from qwenlet.tokenizer_formats import Vocabulary
from random_qwen import random_qwen

CPU = torch.device("cpu")
END = 256
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int8"}  # weights -> cache


def byte_tokenizer() -> Tokenizer:
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": END, "<|im_start|>": 257, "<|im_end|>": 258}
    return Tokenizer(Vocabulary(ranks, special, QWEN, 259, "single bytes"))


def random_model(kind: str, **changes: object) -> Qwen:
    """A small Qwen-1 whose weights are `kind`."""
    sizes: dict[str, object] = {
        "vocab_size": 271, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 96, "max_position_embeddings": 4096,
    }  # fmt: skip
    model = random_qwen(0.15, **(sizes | changes))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and cpu.available():
            if kind in FLOATS:
                replace_linear(model, name, TiledLinear(module.weight.to(FLOATS[kind]), module.bias))
            else:
                tiles = to_tiles(round_to_nearest(module.weight, int(kind[3:]), 32))
                replace_linear(model, name, QuantLinear(tiles, module.bias))
    return model


def small_engine(model: Qwen, kind: str = "fp32", *, tokenizer: bool = True, **options: object) -> Engine:
    settings = EngineConfig(**({"max_context": 256, "kv_cache": KINDS[kind]} | options))  # type: ignore[arg-type]
    return Engine(model, byte_tokenizer() if tokenizer else None, settings, GenerationDefaults(), CPU, (END,))
