"""Whether the kernels run here, and this model. Imports no triton."""

from __future__ import annotations

import torch
from torch import nn

from qwenlet.config import ModelConfig
from qwenlet.linear import QuantLinear
from qwenlet.model import Qwen
from qwenlet.ops import triton


def obstacle(device: torch.device) -> str | None:
    """Why the kernels don't run on this device; None where they do."""
    status = triton.status()
    if not status.runs:
        return status.reason
    if device.type != "cuda" and not triton.interpreted():
        return f"Triton's kernels are for a GPU, not {device} (TRITON_INTERPRET=1 runs them slowly, for tests)"
    return None


def unfit(model: Qwen, cache: torch.dtype) -> str | None:
    """Why the kernels can't run this model over a cache of this type; None where they can."""
    dtype = model.transformer.ln_f.weight.dtype
    if cache not in (dtype, torch.int8):
        return f"the cache is {cache} and the model {dtype}"
    if (reason := shape_obstacle(model.config)) is not None:
        return reason
    for name, module in model.named_modules():
        if name.endswith(("c_attn", "c_proj", "w1", "w2", "lm_head")) and not isinstance(
            module, QuantLinear | nn.Linear
        ):
            return f"{name} is a {type(module).__name__}, which is for a CPU"
    return None


def shape_obstacle(config: ModelConfig) -> str | None:
    """Why the kernels can't run a model of these shapes; None where they can."""
    dim = config.head_dim
    if dim & (dim - 1) or not 16 <= dim <= 256:
        return f"heads of {dim} are no power of two from 16 to 256"
    return None
