"""Random weights without files, for measuring: a model of any shape stands in memory as fast as it can be filled.

`save.write_random` draws each number and writes them; here one block of numbers is repeated, at no multiple of a row,
so that no two neighbours are alike. With a QuantConfig the codes themselves are random: nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qwenlet.checkpoint.load import Checkpoint
from qwenlet.checkpoint.names import Part
from qwenlet.checkpoint.source import Source
from qwenlet.config import EMBEDDING_GROUP_SIZE, GenerationDefaults, ModelConfig, QuantConfig
from qwenlet.linear import QuantEmbedding
from qwenlet.model import Qwen
from qwenlet.ops.memory import large_pages
from qwenlet.ops.packing import TILE_ROWS, Tiles

_BLOCK = 4_194_301  # numbers; a prime
_CODES_SPREAD = {4: 4.6, 8: 74.0}  # standard deviation of codes of equal likelihood


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """A checkpoint of the published layout that lies nowhere.

    Attributes:
        dtype: that its floats count as stored in; seed: the same one gives the same weights.
    """

    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        quant: QuantConfig | None = None,
        seed: int = 0,
    ) -> RandomCheckpoint:
        """`quant`: in whose codes the linears are; None: floats. Raises ConfigError where it doesn't fit the shapes."""
        quant = None if quant is None else quant.fit(config)
        path = Path(f"random-{config.model_type}-{config.num_hidden_layers}x{config.hidden_size}")
        return cls(path, config, GenerationDefaults(), "qwen", quant=quant, dtype=dtype, seed=seed)

    @property
    def chat_template(self) -> str:
        return ""

    @property
    def source(self) -> Source:
        """Names a file that isn't there: its digest can't be had."""
        return Source([self.path.with_suffix(".random")])

    def weights(self) -> RandomWeights:
        return RandomWeights(self.config, self.dtype, self.quant, self.seed)


class RandomWeights:
    """A WeightFile of random numbers, spread as the published initialisation spreads them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, quant: QuantConfig | None, seed: int) -> None:
        with torch.device("meta"):
            self._skeleton = Qwen(config)
        self._shapes = {name: tuple(p.shape) for name, p in self._skeleton.named_parameters()}
        self._dtype, self._quant = dtype, quant
        self._generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(_BLOCK, generator=self._generator)
        self._words = torch.randint(-(1 << 31), 1 << 31, (_BLOCK,), generator=self._generator).to(torch.int32)

    def names(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        std = self._skeleton.initial_std(name)
        if not std:
            return torch.full(self._shapes[name], 0.0 if std is None else 1.0, dtype=dtype)
        return _filled(self._shapes[name], (self._normal * std).to(dtype))

    def read_tiles(self, parts: Sequence[Part]) -> Tiles | None:
        (part,) = parts
        name = part.name.removesuffix(".weight")
        bits, group = (None if self._quant is None else self._quant.of_linear(name)) or (None, None)
        if self._quant is None or bits is None or group is None:
            return None
        rows, columns = self._shapes[part.name]
        tiles = -(-rows // TILE_ROWS)
        std = self._skeleton.initial_std(part.name) or 0.0
        scales = torch.full((tiles, columns // group, TILE_ROWS), std / _CODES_SPREAD[bits], dtype=torch.float16)
        zeros = None
        if not self._quant.sym:
            zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
        words = _filled((tiles, columns * bits // 32, TILE_ROWS), self._words)
        return Tiles(bits, group, rows, words, scales, zeros)

    def read_embedding(self, name: str, dtype: torch.dtype) -> nn.Module | None:
        if self._quant is None or self._quant.embedding_bits is None:
            return None
        rows, columns = self._shapes[name]
        std = self._skeleton.initial_std(name) or 0.0
        scales = torch.full((rows, columns // EMBEDDING_GROUP_SIZE), std / _CODES_SPREAD[8], dtype=torch.float16)
        return QuantEmbedding(_filled((rows, columns), self._words.view(torch.int8)), scales, dtype)


def _filled(shape: tuple[int, ...], block: Tensor) -> Tensor:
    """A tensor of this shape, of the block again and again, in large pages."""
    whole = large_pages(math.prod(shape) * block.itemsize).view(block.dtype)
    for at in range(0, len(whole), len(block)):
        piece = whole[at : at + len(block)]
        piece.copy_(block[: len(piece)])
    return whole.view(shape)
