"""Cache pages of one layer, and the kernels' order of the keys in them.

In a page of the kernels 64 keys lie in four tiles of sixteen, and in a tile the first four bytes of every key come
first, then the next four bytes of each: [pages, G, 4, D / q, 16, q] with q numbers in four bytes. So one 64-byte load
holds a word of sixteen keys and their scores come out side by side. Int8 keys are stored 128 higher, as unsigned bytes.
Values lie row by row. `untile` gives plain keys back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TILE_KEYS = 16


@dataclass(frozen=True)
class CachePages:
    """Keys and values of one layer.

    Attributes:
        k, v: [pages, G, page, D]; k perhaps in tiles.
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
