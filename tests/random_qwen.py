"""A small Qwen-1 of random weights."""

from __future__ import annotations

import torch
from torch import nn

from qwenlet.config import ModelConfig
from qwenlet.model import Qwen


def random_qwen(std: float, **sizes: object) -> Qwen:
    """With NTK and log-n attention beyond 64 tokens, torch's linears, float32, two layers unless `sizes` say otherwise.

    Args: std: of all weights but the norms', which lie around 1.
    """
    fields: dict[str, object] = {
        "model_type": "qwen", "num_hidden_layers": 2, "max_position_embeddings": 512, "seq_length": 64,
        "use_dynamic_ntk": True, "use_logn_attn": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen(ModelConfig(**(fields | sizes))).eval().requires_grad_(False)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "ln_" in name else 0.0, std=std)
    return model
