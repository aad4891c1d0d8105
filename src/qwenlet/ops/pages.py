"""Cache pages of one layer, and the kernels' order of the numbers in them.

In a page of the kernels 64 keys lie in four tiles of sixteen, and in a tile the first four bytes of every key come
first, then the next four bytes of each: [pages, G, 4, D / q, 16, q] with q numbers in four bytes. So one 64-byte load
holds a word of sixteen keys and their scores come out side by side. Int8 keys are stored 128 higher, as unsigned bytes.
Int8 values lie in tiles of sixteen numbers, four tokens in a word: [pages, G, D / 16, 16, 16, 4]; others row by row.
`untile` and `untile_values` give plain ones back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TILE_KEYS = _TILE_NUMBERS = 16


@dataclass(frozen=True)
class CachePages:
    """Keys and values of one layer.

    Attributes:
        k, v: [pages, G, page, D]; perhaps in tiles.
        k_scales, v_scales: [pages, G, page] float32 for int8 pages, else None.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


def untile(k: Tensor) -> Tensor:
    """Keys [pages, G, page, D] of the kernels, row by row."""
    pages, heads, tokens, dim = k.shape
    each = 4 // k.itemsize
    tiles = k.view(pages, heads, tokens // _TILE_KEYS, dim // each, _TILE_KEYS, each)
    plain = tiles.transpose(3, 4).reshape(k.shape)
    return plain ^ -128 if k.dtype == torch.int8 else plain


def untile_values(v: Tensor) -> Tensor:
    """Values [pages, G, page, D] of the kernels, row by row."""
    if v.dtype != torch.int8:
        return v
    pages, heads, tokens, dim = v.shape
    tiles = v.view(pages, heads, dim // _TILE_NUMBERS, tokens // 4, _TILE_NUMBERS, 4)
    return tiles.permute(0, 1, 3, 5, 2, 4).reshape(v.shape)
