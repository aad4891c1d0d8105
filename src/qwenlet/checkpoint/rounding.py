"""Weights rounded to nearest while they are read: what quant="int4" does to a checkpoint of floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from qwenlet.config import EMBEDDING_GROUP_SIZE, QuantConfig
from qwenlet.ops.packing import QuantTensor
from qwenlet.ops.rounding import round_to_nearest

_SLICE_ROWS = 4096  # of an embedding at a time


class Rounding:
    """Rounds what `quant` (fitted to the model) asks for.

    Args:
        importance: how much each input [K] of a linear counts, by our name of it; called once, when a linear of four
            bits is rounded. None, or a name it lacks: all inputs alike.
    """

    def __init__(self, quant: QuantConfig, importance: Callable[[], Mapping[str, Tensor]] | None = None) -> None:
        self.quant, self._importance = quant, importance

    @cached_property
    def importance(self) -> Mapping[str, Tensor]:
        return {} if self._importance is None else self._importance()

    def linear(self, name: str, weight: Tensor) -> QuantTensor:
        """A linear's weight [N, K] of any float dtype, by our name; it must be one that `quant` names."""
        bits, group_size = self.quant.of_linear(name) or (None, None)
        assert bits is not None, f"{name} stays float"
        assert group_size is not None, "fit() the group size to the model first"
        counts = self.importance.get(name) if bits == 4 else None
        return round_to_nearest(weight, bits, group_size, sym=self.quant.sym, mse=self.quant.mse, importance=counts)

    def embedding(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """[V, C] of any float dtype -> codes [V, C] int8 and scales [V, C / 32] float16."""
        codes = torch.empty_like(table, dtype=torch.int8)
        scales = codes.new_empty(table.shape[0], table.shape[1] // EMBEDDING_GROUP_SIZE, dtype=torch.float16)
        for at in range(0, len(table), _SLICE_ROWS):
            rows = slice(at, at + _SLICE_ROWS)
            rounded = round_to_nearest(table[rows], 8, EMBEDDING_GROUP_SIZE)
            codes[rows], scales[rows] = (rounded.codes ^ 0x80).view(torch.int8), rounded.scales
        return codes, scales
