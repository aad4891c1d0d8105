"""Modules that run weights in codes: as they are stored, or rounded while they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qwenlet.checkpoint.files import WeightFile, read_parts
from qwenlet.checkpoint.names import Part
from qwenlet.checkpoint.rounding import Rounding
from qwenlet.linear import QuantEmbedding, QuantLinear
from qwenlet.model import Linear
from qwenlet.ops.packing import Tiles, to_tiles


class CodeReader:
    """Reads what stands in for the float modules of a model.

    Args:
        dtype: of the activations, and of what stays float.
        rounding: rounds weights that are stored as floats; None: they stay floats.
        requantize: rounding goes before codes that are stored, too.

    Attributes:
        bits: the codes seen so far, 4 and 8. floats: names of the linears that stay float. bytes: of all codes.
    """

    def __init__(
        self, weights: WeightFile, dtype: torch.dtype, rounding: Rounding | None = None, *, requantize: bool = False
    ) -> None:
        self.weights, self.dtype, self.rounding = weights, dtype, rounding
        self.bits: set[int] = set()
        self.floats: list[str] = []
        self.bytes = 0
        self._requantize = requantize

    def module(self, name: str, module: nn.Module, parts: Mapping[str, Sequence[Part]]) -> nn.Module | None:
        """What stands in for `module`, whose parameters are made of `parts`; None where it stays as it is."""
        if isinstance(module, nn.Embedding):
            return self._embedding(parts["weight"])
        if not isinstance(module, nn.Linear):
            return None
        tiles = self._tiles(name, parts["weight"])
        if tiles is None:
            self.floats.append(name)
            return None
        bias = read_parts(self.weights, parts["bias"], torch.float32) if "bias" in parts else None
        return self._linear(tiles, bias)

    def tied_head(self, parts: Sequence[Part]) -> nn.Module:
        """The head out of the embedding's parts: a copy in tiles, as the embedding is read in place."""
        tiles = self._tiles("lm_head", parts)
        if tiles is not None:
            return self._linear(tiles, None)
        self.floats.append("lm_head")
        weight = read_parts(self.weights, parts, self.dtype)
        with torch.device("meta"):
            head = Linear(weight.shape[1], weight.shape[0], bias=False)
        head.weight = nn.Parameter(weight, requires_grad=False)
        return head

    def _linear(self, tiles: Tiles, bias: Tensor | None) -> QuantLinear:
        self.bits.add(tiles.bits)
        self.bytes += sum(t.nbytes for t in (tiles.weight, tiles.scales, tiles.zeros, tiles.minimums) if t is not None)
        return QuantLinear(tiles, bias)

    def _tiles(self, name: str, parts: Sequence[Part]) -> Tiles | None:
        if self._requantize:
            return self._rounded(name, parts) or self.weights.read_tiles(parts)
        return self.weights.read_tiles(parts) or self._rounded(name, parts)

    def _rounded(self, name: str, parts: Sequence[Part]) -> Tiles | None:
        if self.rounding is None or self.rounding.quant.of_linear(name) is None:
            return None
        rounded = self.rounding.linear(name, read_parts(self.weights, parts, float_dtype(self.weights, parts)))
        return to_tiles(rounded)

    def _embedding(self, parts: Sequence[Part]) -> nn.Module | None:
        stored = self.weights.read_embedding(parts[0].name, self.dtype)
        if isinstance(stored, QuantEmbedding):
            codes: QuantEmbedding | None = stored
        else:
            codes = self._rounded_embedding(parts)
        if codes is not None:
            self.bytes += codes.codes.nbytes + codes.scales.nbytes
        return codes or stored

    def _rounded_embedding(self, parts: Sequence[Part]) -> QuantEmbedding | None:
        if self.rounding is None or self.rounding.quant.embedding_bits is None:
            return None
        table = read_parts(self.weights, parts, float_dtype(self.weights, parts))
        return QuantEmbedding(*self.rounding.embedding(table), self.dtype)


def float_dtype(weights: WeightFile, parts: Sequence[Part]) -> torch.dtype:
    """As the parts are stored, so that they need not be copied; float32 where they are in codes."""
    return weights.stored_dtype(parts[0].name) or torch.float32
