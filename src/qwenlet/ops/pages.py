"""Cache pages of one layer: plain ones, which the modules read, and the kernels' own.

In the kernels' memory what one thread reads of a layer is a long stretch, since a processor reads ahead by itself only
where it isn't made to jump: the heads are divided into groups, one for each thread; of eight pages one group's lie
side by side, then the next group's, the next layer's, the next eight pages'. A page of a group is

    scales of int8 keys [g, 64] and of values [g, 64], float32
    keys: four tiles of sixteen; of a tile first four bytes of every key, then the next four of each:
        [g, 4, D / q, 16, q] with q numbers in four bytes. One 64-byte load holds a word of sixteen keys, and their
        scores come out side by side. Int8 keys are stored 128 higher, as unsigned bytes.
    values: int8 ones in tiles of sixteen numbers, four tokens in a word, [g, D / 16, 16, 16, 4]; others row by row
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenlet.ops.memory import large_pages

PAGE_TOKENS = 64
RUN_PAGES = 8  # side by side; memory comes in these, so more would cost a short conversation more of it

_TILE_KEYS = _TILE_NUMBERS = 16


@dataclass(frozen=True)
class CachePages:
    """Keys and values of one layer.

    Attributes:
        k, v: [pages, G, page, D].
        k_scales, v_scales: [pages, G, page] float32 for int8 pages, else None.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


@dataclass(frozen=True)
class TiledPages:
    """One layer of the kernels' memory.

    Attributes:
        memory: uint8 [runs, groups, RUN_PAGES, bytes].
        dtype: of the numbers.
    """

    memory: Tensor
    dtype: torch.dtype
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Heads of a group."""
        return self.kv_heads // self.memory.shape[1]

    def copy(self, source: int, target: int) -> None:
        """The content of a page."""
        (to, to_slot), (run, slot) = divmod(target, RUN_PAGES), divmod(source, RUN_PAGES)
        self.memory[to, :, to_slot] = self.memory[run, :, slot]

    def plain(self) -> CachePages:
        """A copy, row by row."""
        groups = self.memory.transpose(1, 2).flatten(0, 1)  # [pages, groups, bytes]
        scales = self.group * PAGE_TOKENS * 4 if self.dtype == torch.int8 else 0
        part = (groups.shape[2] - 2 * scales) // 2
        of_k, of_v, k, v = groups.split([scales, scales, part, part], dim=2)
        shape = (len(groups), self.kv_heads, PAGE_TOKENS, self.head_dim)
        k, v = (x.contiguous().view(self.dtype).view(shape) for x in (k, v))
        if not scales:
            return CachePages(_untile(k), v)
        of_k, of_v = (x.contiguous().view(torch.float32).view(shape[:3]) for x in (of_k, of_v))
        return CachePages(_untile(k) ^ -128, _untile_values(v), of_k, of_v)


def tiled_layers(layers: int, pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[TiledPages]:
    """Room for at least that many pages, in memory once written; as many groups as the threads of now share evenly."""
    groups = math.gcd(kv_heads, torch.get_num_threads())
    token = head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    shape = (-(-pages // RUN_PAGES), layers, groups, RUN_PAGES, 2 * kv_heads // groups * PAGE_TOKENS * token)
    whole = large_pages(math.prod(shape)).view(shape)
    return [TiledPages(layer, dtype, kv_heads, head_dim) for layer in whole.unbind(1)]


def _untile(k: Tensor) -> Tensor:
    """Keys [pages, G, page, D], row by row."""
    pages, heads, tokens, dim = k.shape
    each = 4 // k.itemsize
    tiles = k.view(pages, heads, tokens // _TILE_KEYS, dim // each, _TILE_KEYS, each)
    return tiles.transpose(3, 4).reshape(k.shape)


def _untile_values(v: Tensor) -> Tensor:
    """Int8 values [pages, G, page, D], row by row."""
    pages, heads, tokens, dim = v.shape
    tiles = v.view(pages, heads, dim // _TILE_NUMBERS, tokens // 4, _TILE_NUMBERS, 4)
    return tiles.permute(0, 1, 3, 5, 2, 4).reshape(v.shape)
