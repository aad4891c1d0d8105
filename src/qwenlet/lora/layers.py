"""The modules that train: y = W x + b + scale * B A x beside a frozen W, of floats or of codes.

A and B are float32 whatever the model computes in, so that small steps of an optimizer are not lost; they are rounded
to the inputs' dtype where they multiply. Over weights in codes the forward pass is the kernels' and the backward pass
dequantizes some columns at a time (`linear.frozen_linear`).

With `dora` each row of the adapted weight has a length of its own: y = m / |W + scale * B A| * (W + scale * B A) x + b,
where the norm counts as a constant, as in the paper.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qwenlet.config import LoraConfig
from qwenlet.errors import ConfigError
from qwenlet.linear import (
    MappedEmbedding,
    QuantEmbedding,
    QuantLinear,
    StreamedLinear,
    TiledLinear,
    float_weight,
    replace_linear,
)
from qwenlet.lora.product import adapted
from qwenlet.model import Embedding, Linear, Qwen, RMSNorm
from qwenlet.ops.packing import Tiles

_LINEARS = (nn.Linear, QuantLinear, TiledLinear, StreamedLinear)
_TIED = ("wte", "lm_head")


class LoraLinear(nn.Module):
    """A frozen linear with a low-rank part.

    Attributes:
        base: the linear as it was; lora_A: [rank, in] and lora_B: [out, rank], float32; B begins at zero.
        lora_magnitude_vector: [out] float32 with `dora`, else None.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, base: nn.Module, name: str, config: LoraConfig, rank: int | None = None) -> None:
        super().__init__()
        assert isinstance(base, _LINEARS), f"{type(base).__name__} is no linear that trains"
        self.base, self.config = base, config
        self.in_features, self.out_features = base.in_features, base.out_features
        rank = config.rank if rank is None else rank
        self.scale = config.scale(name, rank)
        tiles = getattr(base, "tiles", None)
        device = tiles.weight.device if isinstance(tiles, Tiles) else next(p.device for p in base.parameters())
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude_vector = None
        if config.dora:
            squares = float_weight(base).float().square().sum(1)  # (out,) of W's rows
            self.register_buffer("squares", squares, persistent=False)
            self.lora_magnitude_vector = nn.Parameter(squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if not self.enabled:
            return self.base(x)
        share = self.config.dropout if self.training else 0.0
        scale = self.scale / (1.0 - share)
        base: Any = self.base  # frozen, one of _LINEARS
        weight = getattr(base, "tiles", None)
        y = adapted(x, base.weight if weight is None else weight, base.bias, self.lora_A, self.lora_B, scale, share)
        if self.lora_magnitude_vector is None:
            return y
        length = (self.lora_magnitude_vector / self.row_norms()).to(x.dtype)
        if base.bias is None:
            return length * y
        return length * (y - base.bias.to(y.dtype)) + base.bias.to(y.dtype)

    # switched off by `adapter_off`: the model then is the one before training
    enabled: bool = True

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """[out] float32: lengths of the rows of W + scale * B A, without standing in memory as a whole:
        |w + b A|^2 = |w|^2 + 2 b . (A w) + b . (A A^T b)."""
        assert isinstance(self.squares, Tensor)
        a, b = self.lora_A, self.lora_B * self.scale
        dtype = next((p.dtype for p in self.base.parameters()), torch.float32)
        plain = self.base(a.to(dtype)).float().T  # (out, rank)
        if self.base.bias is not None:
            plain = plain - self.base.bias.float()[:, None]
        squares = self.squares + 2 * (b * plain).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
        return squares.clamp_min(1e-12).sqrt()

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}"


class adapter_off:
    """Within it the model computes what it computed before it was adapted: `with adapter_off(model): ...`.

    Modules that train as a whole are not switched; a model that has some raises ConfigError.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        if any(layer.config.modules_to_save for layer in self._layers[:1]):
            raise ConfigError(
                "an adapter with modules_to_save can't be switched off: those are trained in place",
                hint="leave modules_to_save out, or keep a second copy of the model",
            )

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.enabled = False

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.enabled = True


def lora_config(model: nn.Module) -> LoraConfig | None:
    """What the model was adapted with; None if it wasn't."""
    return next((module.config for module in model.modules() if isinstance(module, LoraLinear)), None)


def add_lora(model: Qwen, config: LoraConfig, ranks: dict[str, int] | None = None) -> None:
    """Freezes the model and puts low-rank parts beside the linears that `config` names, in place.

    Args:
        ranks: of the linears to adapt, by name; None: `config.rank` for all that it targets.
    Raises:
        ConfigError: the model was adapted before, or a name in `config` that no module has.
    """
    if lora_config(model) is not None:
        raise ConfigError("the model has an adapter already", hint="load it again, or merge the adapter first")
    model.requires_grad_(False)
    chosen = ranks if ranks is not None else dict.fromkeys(_targets(model, config), config.rank)
    for name, rank in chosen.items():
        base = model.get_submodule(name)
        if not isinstance(base, _LINEARS):
            raise ConfigError(
                f"{name} is a {type(base).__name__}, which can't be trained beside", hint="load with linear='torch'"
            )
        replace_linear(model, name, LoraLinear(base, name, config, rank).train(model.training))
    for name in saved_modules(model, config):
        module = trainable_module(model, name)
        module.requires_grad_(True)
    if model.config.tie_word_embeddings and set(config.modules_to_save) & set(_TIED):
        model.tie_weights()


def _targets(model: Qwen, config: LoraConfig) -> list[str]:
    linears = [name for name, module in model.named_modules() if isinstance(module, _LINEARS) and name]
    _check_known("targets", config.targets, linears)
    found = [name for name in linears if name.rpartition(".")[2] in config.targets]
    if not found:
        raise ConfigError("targets names no linear", hint="the published ones are c_attn, c_proj, w1 and w2")
    return found


def saved_modules(model: Qwen, config: LoraConfig) -> list[str]:
    """Full names of the modules that train as a whole. Of a tied pair, both: they are one parameter."""
    wanted = set(config.modules_to_save)
    if model.config.tie_word_embeddings and wanted & set(_TIED):
        wanted |= set(_TIED)
    kinds = (*_LINEARS, nn.Embedding, QuantEmbedding, MappedEmbedding, RMSNorm)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    _check_known("modules_to_save", config.modules_to_save, names)
    return [name for name in names if name.rpartition(".")[2] in wanted]


def _check_known(option: str, asked: tuple[str, ...] | object, names: list[str]) -> None:
    assert isinstance(asked, tuple)
    known = dict.fromkeys(name.rpartition(".")[2] for name in names)
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(
            f"{option} names {', '.join(unknown)}, but the model has {', '.join(known)}",
            hint="give the last part of a module's name, such as c_attn",
        )


def trainable_module(model: Qwen, name: str) -> nn.Module:
    """The module of that name with float parameters: one that lies in codes or tiles is replaced by its floats."""
    module = model.get_submodule(name)
    if isinstance(module, QuantLinear | TiledLinear | StreamedLinear):
        weight, bias = float_weight(module), module.bias
        with torch.device("meta"):
            linear = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(weight.dtype).clone())
        module = linear
    elif isinstance(module, QuantEmbedding | MappedEmbedding):
        shape = (model.config.vocab_size, model.config.hidden_size)
        device = (module.codes if isinstance(module, QuantEmbedding) else module.rows).device
        table = torch.empty(shape, dtype=module.dtype, device=device)
        for rows in torch.arange(shape[0], device=device).split(4096):
            table[rows] = module(rows)
        with torch.device("meta"):
            embedding = Embedding(*shape)
        embedding.weight = nn.Parameter(table)
        module = embedding
    else:
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            # a mapped file's memory is not ours to write
            setattr(module, leaf, nn.Parameter(parameter.detach().clone()))
    replace_linear(model, name, module)
    return module


def grow_vocabulary(model: Qwen, size: int) -> None:
    """Gives embedding and head rows for `size` tokens, as floats also where they lay in codes or tiles, in place."""
    for name in ("transformer.wte", "lm_head"):
        trainable_module(model, name)
    model.resize_vocabulary(size)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, each once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
