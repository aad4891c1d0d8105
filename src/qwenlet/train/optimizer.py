"""AdamW over the parameters that learn, and its state by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwenlet.config import TrainingConfig
from qwenlet.errors import ConfigError, MissingExtraError
from qwenlet.train.processes import like, whole_tensor

SEPARATOR = "::"


def new_optimizer(model: nn.Module, config: TrainingConfig, lr: float) -> torch.optim.Optimizer:
    """Raises MissingExtraError or ConfigError where the 8-bit one can't be had."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=_can_fuse(learning))
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtraError("bitsandbytes", "adam8bit", "optimizer='adamw8bit'") from None
    if learning[0].device.type == "cpu":
        raise ConfigError("optimizer is 'adamw8bit', which needs a GPU", hint="use optimizer='adamw'")
    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=betas, eps=1e-8)
    return made


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    return all(type(p) is nn.Parameter and p.device.type in ("cpu", "cuda") for p in parameters)


def learning_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state, whole and on the CPU, by kind and parameter. All processes must ask."""
    state: dict[str, Tensor] = {}
    for name, parameter in learning_names(model).items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            state[f"{kind}{SEPARATOR}{name}"] = whole_tensor(tensor).contiguous()
    return state


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """The way back from `optimizer_state`."""
    parameters = learning_names(model)
    for key, tensor in state.items():
        kind, _, name = key.partition(SEPARATOR)
        parameter = parameters[name]
        kept: dict[str, Any] = optimizer.state[parameter]
        # the count of steps lives where the optimizer wants it: on the CPU, but for a fused one on a GPU
        if kind == "step" and not optimizer.defaults.get("fused"):
            kept[kind] = tensor.clone()
        else:
            kept[kind] = like(tensor.clone(), parameter.data)
