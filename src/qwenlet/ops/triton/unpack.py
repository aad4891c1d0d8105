"""Weights in tiles as rows of floats, for products of many rows."""

from __future__ import annotations

import triton
import triton.language as tl

from qwenlet.ops.triton.codes import SYMMETRIC, group_table, weights_of


@triton.jit
def _pair(words, s, e, i: tl.constexpr, j: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    return tl.join(weights_of(words, s, e, i, BITS, KIND), weights_of(words, s, e, j, BITS, KIND))


@triton.jit
def unpack(
    words, scales, extra, order, y,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    BW: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """BW words of one tile's 16 rows -> y [N, K]."""
    PER: tl.constexpr = 32 // BITS
    W: tl.constexpr = K // PER
    tile, n = tl.program_id(0), tl.arange(0, 16)[:, None]
    w = tl.program_id(1) * BW + tl.arange(0, BW)[None, :]
    keep = (n < 16) & (w < W)
    mine = tl.load(words + tile.to(tl.int64) * (W * 16) + w * 16 + n, mask=keep, other=0)
    group = tile * (K // GROUP * 16) + w // (GROUP // PER) * 16 + n
    s = group_table(scales, group, keep)
    e = s
    if KIND != SYMMETRIC:
        e = group_table(extra, group, keep)
    # joined along a last axis each time, the lowest bit of a code's number last: side by side they are in order
    if PER == 4:
        values = tl.join(_pair(mine, s, e, 0, 2, BITS, KIND), _pair(mine, s, e, 1, 3, BITS, KIND))
    else:
        even = tl.join(_pair(mine, s, e, 0, 4, BITS, KIND), _pair(mine, s, e, 2, 6, BITS, KIND))
        odd = tl.join(_pair(mine, s, e, 1, 5, BITS, KIND), _pair(mine, s, e, 3, 7, BITS, KIND))
        values = tl.join(even, odd)
    values = tl.reshape(values, (16, BW * PER))
    column = tl.program_id(1) * (BW * PER) + tl.arange(0, BW * PER)[None, :]
    real = column < K
    if ORDER:
        column = tl.load(order + column, mask=real, other=0)
    row = tile * 16 + n
    tl.store(y + row.to(tl.int64) * K + column, values.to(y.dtype.element_ty), mask=real & (row < N))
