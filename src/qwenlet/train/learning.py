"""What of a model learns: all of it, a new adapter, or one that goes on.

Shapes are enough, so that a plan can be made of a model on the meta device before any weight is loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch

from qwenlet.config import LoraConfig, ModelConfig
from qwenlet.errors import ConfigError
from qwenlet.linear import MappedEmbedding, QuantEmbedding
from qwenlet.lora import add_lora, load_adapter
from qwenlet.lora.layers import grow_vocabulary, lora_config
from qwenlet.model import Qwen, RMSNorm

_VOCABULARY = {"wte", "lm_head"}
_KINDS = ("rank", "alpha", "dropout", "targets", "modules_to_save", "rslora", "dora")


def shapes_of(config: ModelConfig) -> Qwen:
    """A model without weights."""
    with torch.device("meta"):
        return Qwen(config)


def make_learn(
    model: Qwen, *, whole: bool, lora: LoraConfig | None = None, adapter: Path | None = None, vocabulary: int
) -> None:
    """Lets all of a model learn, or an adapter beside it, in place.

    Args:
        lora: of a new adapter, or what was asked for of the one in the folder `adapter`, which goes on as it was begun.
        vocabulary: tokens; a model of fewer rows grows, and the new ones have to learn.
    Raises:
        ConfigError: new rows would not learn, or an adapter that goes on is asked to be another.
        CheckpointError: as `load_adapter`.
    """
    lora = lora or LoraConfig()
    if whole:
        _grow(model, vocabulary)
        model.requires_grad_(True)
        return
    rows = model.config.vocab_size
    if adapter is None:
        if vocabulary > rows and _VOCABULARY - set(lora.modules_to_save):
            raise ConfigError(_untaught(vocabulary, rows), hint="add --modules-to-save wte --modules-to-save lm_head")
        _grow(model, vocabulary)
        add_lora(model, lora)
        return
    load_adapter(model, adapter)
    own = lora_config(model)
    assert own is not None
    _check_same(lora, own, adapter)
    if vocabulary > model.config.vocab_size and _VOCABULARY - set(own.modules_to_save):
        raise ConfigError(
            f"{_untaught(vocabulary, rows)}, and the adapter in {adapter} does not train them",
            hint="merge it first, and begin one with --modules-to-save wte --modules-to-save lm_head",
        )
    _grow(model, vocabulary)


def _grow(model: Qwen, vocabulary: int) -> None:
    if vocabulary > model.config.vocab_size:
        grow_vocabulary(model, vocabulary)


def _untaught(vocabulary: int, rows: int) -> str:
    return f"the vocabulary has {vocabulary} tokens, but the model {rows}: the rows of the new ones have to learn"


def _check_same(asked: LoraConfig, own: LoraConfig, adapter: Path) -> None:
    """What was asked for must be as nothing was said, or as the adapter is."""
    for name in _KINDS:
        unsaid, wanted, found = (_unordered(getattr(config, name)) for config in (LoraConfig(), asked, own))
        if wanted not in (unsaid, found):
            raise ConfigError(
                f"{name} is {getattr(asked, name)!r}, but the adapter in {adapter} was begun with "
                f"{getattr(own, name)!r}",
                hint=f"leave --{name.replace('_', '-')} out: an adapter goes on as it was begun",
            )


def _unordered(value: object) -> object:
    return set(value) if isinstance(value, tuple) else value


def compute_in(model: Qwen, dtype: torch.dtype) -> None:
    """What stands in floats beside weights in codes, norms and rows of the embedding, becomes `dtype`."""
    for module in model.modules():
        if isinstance(module, QuantEmbedding | MappedEmbedding):
            module.dtype = dtype
        elif isinstance(module, RMSNorm):
            module.weight.data = module.weight.data.to(dtype)


def keep_masters(model: Qwen) -> None:
    """What learns becomes float32 in memory of its own: small steps would be lost in 16 bits."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            own = parameter.data.clone() if parameter.dtype == torch.float32 else parameter.data.float()
            parameter.data = own
