"""Small models with adapters that do something."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.tiny import random_model
from qwenlet.config import LoraConfig
from qwenlet.lora import Adapter, Factors, LoraLinear
from qwenlet.model import Qwen


def plain_model(**changes: object) -> Qwen:
    """Floats in torch's own linears."""
    model = random_model("fp32", **changes)
    reference = Qwen(model.config).eval()
    torch.manual_seed(1)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return reference


def stir(model: Qwen) -> None:
    """B away from zero, so that the low-rank parts do something."""
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)


def random_adapter(model: Qwen, seed: int, rank: int = 4, *, whole: bool = False, names: str = "") -> Adapter:
    """An adapter in memory, of the linears whose names hold `names`.

    whole: with an embedding and a head of its own.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * std

    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if hasattr(module, "out_features") and names in name and not (whole and name == "lm_head")
    }
    factors = {name: Factors(normal(rank, k), normal(n, rank), 0.5) for name, (n, k) in shapes.items()}
    size = (model.config.vocab_size, model.config.hidden_size)
    saved = {"transformer.wte.weight": normal(*size), "lm_head.weight": normal(*size)} if whole else {}
    return Adapter(Path(f"adapter-{seed}"), LoraConfig(rank=rank), factors, saved, None)
