"""Modules that run weights in codes: as they are stored, or rounded while they are read.

A linear that is left in floats beside them, as AutoGPTQ leaves the head, runs in the kernels' bfloat16 tiles. A head
that was bfloat16 before it was published in float16 comes back without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qwenlet.checkpoint.files import WeightFile, read_parts
from qwenlet.checkpoint.names import Part
from qwenlet.checkpoint.rounding import Rounding
from qwenlet.checkpoint.tilefile import TileWriter
from qwenlet.linear import BF16_COLUMNS, QuantEmbedding, QuantLinear, TiledLinear, on_device
from qwenlet.model import Linear
from qwenlet.ops import cpu
from qwenlet.ops.packing import Tiles, to_tiles

_CPU = torch.device("cpu")


class CodeReader:
    """Reads what stands in for the float modules of a model.

    Args:
        dtype: of the activations, and of what stays float.
        rounding: rounds weights that are stored as floats; None: they stay floats.
        kept: modules that were made before, by name.
        keep: takes the modules that are made, of which only shadows without weights are then given out.
        requantize: rounding goes before codes that are stored, too.
        device: a GPU, if that is where the modules go; weights are rounded there. What stays float then stays torch's.

    Attributes:
        bits: the codes seen so far, 4 and 8. floats: linears that stay float, and in which precision. bytes: of all
            codes and tiles.
    """

    def __init__(
        self,
        weights: WeightFile,
        dtype: torch.dtype,
        rounding: Rounding | None = None,
        *,
        kept: Mapping[str, nn.Module] | None = None,
        keep: TileWriter | None = None,
        requantize: bool = False,
        device: torch.device = _CPU,
    ) -> None:
        self.weights, self.dtype, self.rounding = weights, dtype, rounding
        self._kept, self._keep = kept or {}, keep
        self.bits: set[int] = set()
        self.floats: list[tuple[str, torch.dtype]] = []
        self.bytes = 0
        self._requantize, self._device = requantize, device

    def module(self, name: str, module: nn.Module, parts: Mapping[str, Sequence[Part]]) -> nn.Module | None:
        """What stands in for `module`, whose parameters are made of `parts`; None where it stays as it is."""
        if isinstance(module, nn.Embedding):
            return self._embedding(name, parts["weight"])
        if isinstance(module, nn.Linear):
            return self._linear(name, parts["weight"], parts.get("bias", ()))
        return None

    def tied_head(self, parts: Sequence[Part]) -> nn.Module:
        """The head out of the embedding's parts: a copy in tiles, as the embedding is read in place."""
        head = self._linear("lm_head", parts, ())
        if head is not None:
            return head
        weight = read_parts(self.weights, parts, self.dtype)
        with torch.device("meta"):
            head = Linear(weight.shape[1], weight.shape[0], bias=False)
        head.weight = nn.Parameter(weight, requires_grad=False)
        return head

    def _linear(self, name: str, parts: Sequence[Part], bias_parts: Sequence[Part]) -> nn.Module | None:
        kept = self._kept.get(name)
        if isinstance(kept, QuantLinear | TiledLinear):
            linear: QuantLinear | TiledLinear = kept
        else:
            tiles = self._tiles(name, parts)
            if self._device.type != "cpu" and tiles is not None:
                tiles = on_device(tiles, self._device)
            bias = read_parts(self.weights, bias_parts, torch.float32) if bias_parts else None
            if tiles is not None:
                linear = QuantLinear(tiles, None if bias is None else bias.to(self._device))
            elif (
                self._device.type == "cpu"
                and cpu.status().isa is not None
                and self.weights.shape(parts[0].name)[-1] % BF16_COLUMNS == 0
            ):
                linear = TiledLinear(read_parts(self.weights, parts, torch.bfloat16), bias)
            else:
                self.floats.append((name, self.dtype))
                return None
        tiles = linear.tiles
        self.bytes += sum(t.nbytes for t in (tiles.weight, tiles.scales, tiles.zeros, tiles.minimums) if t is not None)
        if isinstance(linear, QuantLinear):
            self.bits.add(tiles.bits)
        else:
            self.floats.append((name, torch.bfloat16))
        return self._put(name, linear)

    def _put(self, name: str, module: nn.Module) -> nn.Module:
        return nn.Identity() if self._keep is not None and self._keep.put(name, module) else module

    def _tiles(self, name: str, parts: Sequence[Part]) -> Tiles | None:
        if self._requantize:
            return self._rounded(name, parts) or self.weights.read_tiles(parts)
        return self.weights.read_tiles(parts) or self._rounded(name, parts)

    def _rounded(self, name: str, parts: Sequence[Part]) -> Tiles | None:
        if self.rounding is None or self.rounding.quant.of_linear(name) is None:
            return None
        return to_tiles(self.rounding.linear(name, self._read(parts)))

    def _read(self, parts: Sequence[Part]) -> Tensor:
        """A float tensor where it is rounded."""
        return read_parts(self.weights, parts, float_dtype(self.weights, parts)).to(self._device)

    def _embedding(self, name: str, parts: Sequence[Part]) -> nn.Module | None:
        kept, stored = self._kept.get(name), None
        if isinstance(kept, QuantEmbedding):
            codes: QuantEmbedding | None = kept
        else:
            stored = self.weights.read_embedding(parts[0].name, self.dtype)
            codes = stored if isinstance(stored, QuantEmbedding) else self._rounded_embedding(parts)
        if codes is not None:
            self.bytes += codes.codes.nbytes + codes.scales.nbytes
            return self._put(name, codes if self._device.type == "cpu" else _moved(codes, self._device))
        return stored if self._device.type == "cpu" else None

    def _rounded_embedding(self, parts: Sequence[Part]) -> QuantEmbedding | None:
        if self.rounding is None or self.rounding.quant.embedding_bits is None:
            return None
        return QuantEmbedding(*self.rounding.embedding(self._read(parts)), self.dtype)


def _moved(embedding: QuantEmbedding, device: torch.device) -> QuantEmbedding:
    """All of the table on a GPU, row by row."""
    codes, scales = embedding.codes.flatten(1).to(device), embedding.scales.to(device)
    return QuantEmbedding(codes.contiguous(), scales.contiguous(), embedding.dtype)


def float_dtype(weights: WeightFile, parts: Sequence[Part]) -> torch.dtype:
    """As the parts are stored, so that they need not be copied; float32 where they are in codes."""
    return weights.stored_dtype(parts[0].name) or torch.float32
