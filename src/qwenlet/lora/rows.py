"""Adapters chosen row by row: several stand beside one model, and each row of a forward pass goes with one or none.

The native program takes them as `Sides`, in tiles. Where the model runs by its modules, hooks add the same products to
what the linears give; the embedding's hook serves both ways. Rows of one adapter lie together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenlet.errors import CheckpointError
from qwenlet.linear import BF16_COLUMNS, TiledLinear
from qwenlet.lora.adapter import Adapter, Factors
from qwenlet.model import Qwen
from qwenlet.ops import cpu
from qwenlet.ops.packing import Tiles
from qwenlet.program import Sides

_WTE, _HEAD = "transformer.wte.weight", "lm_head.weight"
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter ready to run beside a model.

    Attributes:
        number: never given twice, so that what another adapter of this name computed is not taken for this one's.
        pairs: of linears by name, modules for A and B, the scale in B; head, wte: in place of the model's, or None.
    """

    name: str
    pairs: dict[str, tuple[nn.Module, nn.Module]]
    head: nn.Module | None
    wte: Tensor | None
    number: int = field(default_factory=lambda: next(_numbers))

    @classmethod
    def beside(cls, model: Qwen, name: str, adapter: Adapter) -> LoadedAdapter:
        """Raises CheckpointError for an adapter that has to be merged before it can run."""
        why = _must_be_merged(model, adapter)
        if why is not None:
            raise CheckpointError(
                f"the adapter in {adapter.path} {why}, which can't be chosen row by row",
                hint=f"merge it first: qwenlet merge MODEL {adapter.path} OUT",
            )
        weight = next(model.transformer.h[0].parameters())
        dtype, device = _precision(model), weight.device
        make = partial(_linear, dtype=dtype, device=device)
        pairs = {name: _pair(factors, make) for name, factors in adapter.factors.items()}
        head = make(adapter.saved[_HEAD]) if _HEAD in adapter.saved else None
        wte = adapter.saved[_WTE].to(device) if _WTE in adapter.saved else None
        return cls(name, pairs, head, wte)

    def sides(self) -> Sides:
        """The same for the native program; only where its kernels run."""
        tiles = {name: (_tiles(a), _tiles(b)) for name, (a, b) in self.pairs.items()}
        return Sides(tiles, None if self.head is None else _tiles(self.head))

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        modules = [module for pair in self.pairs.values() for module in pair]
        modules += [] if self.head is None else [self.head]
        return sum(_weight(module).nbytes for module in modules) + (0 if self.wte is None else self.wte.nbytes)


def _must_be_merged(model: Qwen, adapter: Adapter) -> str | None:
    others = sorted(set(adapter.saved) - {_WTE, _HEAD})
    if others:
        return f"brings {', '.join(others[:3])} of its own"
    if adapter.config.dora:
        return "was trained with DoRA, which scales whole weights"
    if adapter.vocab_size not in (None, model.config.vocab_size):
        return f"brings a vocabulary of {adapter.vocab_size:,} instead of {model.config.vocab_size:,}"
    return None


def _precision(model: Qwen) -> torch.dtype:
    """Of the adapters: float32 beside float32 weights, bfloat16 beside codes and bfloat16, else the model's own."""
    linear = model.get_submodule("transformer.h.0.mlp.w1")
    tiles = getattr(linear, "tiles", None)
    if isinstance(tiles, Tiles):
        return torch.float32 if tiles.bits == 32 or cpu.status().isa is None else torch.bfloat16
    return next((p.dtype for p in linear.parameters()), torch.bfloat16)


class _Plain(nn.Module):
    """x W^T by torch."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


def _linear(weight: Tensor, dtype: torch.dtype, device: torch.device) -> nn.Module:
    weight = weight.to(device, dtype)
    kernels = device.type == "cpu" and cpu.status().isa is not None and dtype in (torch.float32, torch.bfloat16)
    fits = dtype == torch.float32 or weight.shape[1] % BF16_COLUMNS == 0
    return TiledLinear(weight, None) if kernels and fits else _Plain(weight)


def _pair(factors: Factors, make: Callable[[Tensor], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A and B with ranks as the kernels like them: more rows and columns of zeros change nothing."""
    spare = -factors.rank % BF16_COLUMNS
    a, b = F.pad(factors.a.float(), (0, 0, 0, spare)), F.pad(factors.b.float() * factors.scale, (0, spare))
    return make(a), make(b)


def _tiles(module: nn.Module) -> Tiles:
    assert isinstance(module, TiledLinear), f"{type(module).__name__} is not in tiles"
    return module.tiles


def _weight(module: nn.Module) -> Tensor:
    return module.tiles.weight if isinstance(module, TiledLinear) else next(module.parameters())


@dataclass(frozen=True)
class Group:
    """Rows [first, last) that go with an adapter."""

    adapter: LoadedAdapter
    first: int
    last: int


class RowAdapters:
    """The adapters beside a model, and which rows of the pass that runs go with which."""

    def __init__(self, model: Qwen) -> None:
        self._model = model
        self._hooked: set[str] = set()
        self._hooks: list[Any] = []
        self._tokens: Sequence[Group] = ()
        self._outputs: Sequence[Group] = ()

    def hook(self, adapter: LoadedAdapter) -> None:
        """Lets the modules that this adapter changes ask which rows to change."""
        names = [*adapter.pairs, *(["lm_head"] if adapter.head is not None else [])]
        for name in names + (["transformer.wte"] if adapter.wte is not None else []):
            if name not in self._hooked:
                self._hooked.add(name)
                change = self._embedded if name == "transformer.wte" else partial(self._changed, name)
                self._hooks.append(self._model.get_submodule(name).register_forward_hook(change))

    def close(self) -> None:
        """Leaves the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hooked = [], set()

    @contextmanager
    def rows(self, tokens: Sequence[Group], outputs: Sequence[Group]) -> Iterator[None]:
        """Within it the model's passes have these groups, among the tokens and among the outputs of the head."""
        self._tokens, self._outputs = tokens, outputs
        try:
            yield
        finally:
            self._tokens = self._outputs = ()

    def _changed(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        for group in self._outputs if name == "lm_head" else self._tokens:
            rows, pair = slice(group.first, group.last), group.adapter.pairs.get(name)
            if name == "lm_head" and group.adapter.head is not None and group.last > group.first:
                output[rows] = group.adapter.head(x[rows])
            if pair is not None and group.last > group.first:
                output[rows] += pair[1](pair[0](x[rows]))
        return output

    def _embedded(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for group in self._tokens:
            if group.adapter.wte is not None:
                rows = slice(group.first, group.last)
                output[rows] = group.adapter.wte[inputs[0][rows]].to(output.dtype)
        return output
