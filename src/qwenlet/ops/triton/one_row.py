"""Products of one row with a weight, at the memory's speed: every weight is read once, in loads of 16 bytes.

No tensor cores: one row has nothing to share. Sums are float32, one order whatever the launch. The norm before the
product costs no pass of its own: x is multiplied with the norm's weight on the way, its squares are summed beside, and
the whole result is scaled at the end.

A program computes BN outputs of one weight or, for SwiGLU, of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenlet.ops.triton.codes import MINIMUMS, SYMMETRIC, ZEROS, code_in_place, group_table


@triton.jit
def finish(total, second, n, keep, bias, residual, y, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr):
    """Bias, activation and residual of finished sums, and storing them at offsets n."""
    if BIAS:
        total += tl.load(bias, mask=keep, other=0.0).to(tl.float32)
    if SWIGLU:
        total *= second * tl.sigmoid(second)
    if RESIDUAL:
        total += tl.load(residual + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + n, total.to(y.dtype.element_ty), mask=keep)


@triton.jit
def float_row(
    x, norm, weight, gate, bias, residual, y, eps,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Weights [N, K] in floats, row by row. Each thread keeps sums of its own columns until the end."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = n.to(tl.int64)[:, None] * K
    sums = tl.zeros((BN, BK), tl.float32)
    others = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((1, BK), tl.float32)
    for at in tl.static_range(0, K, BK):
        k = at + tl.arange(0, BK)[None, :]
        keep = (n[:, None] < N) & (k < K)
        w = tl.load(weight + rows + k, mask=keep, other=0.0).to(tl.float32)
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += values * values
            values *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        sums += w * values
        if SWIGLU:
            others += tl.load(gate + rows + k, mask=keep, other=0.0).to(tl.float32) * values
    total, second = tl.sum(sums, 1), tl.sum(others, 1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares) / K + eps)
        total *= factor
        second *= factor
    finish(total, second, n, n < N, bias + n, residual, y, BIAS, RESIDUAL, SWIGLU)


@triton.jit
def _group(scales, extra, part, total, at, mask, BITS: tl.constexpr, KIND: tl.constexpr):
    """Sums of one word's columns [BW, BN], scaled: `part` of codes, `total` [BW, 1] of the inputs alone."""
    s = group_table(scales, at, mask)
    if KIND == SYMMETRIC:
        return part * s
    elif KIND == ZEROS:
        return (part - (group_table(extra, at, mask) - (1 << (BITS - 1))) * total) * s
    else:
        return part * s + group_table(extra, at, mask) * total


@triton.jit
def codes_row(
    x, norm, order, words, scales, extra, gate_words, gate_scales, gate_extra, bias, residual, y, eps, magic,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, ORDER: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Weights in tiles: BW words of each of BN outputs at a time, so that a row of 16 words is a line of 64 bytes.

    A thread holds words of four neighbouring outputs, and no sum crosses threads before the end. Offsets fit 32 bits
    within a tile only, so the tile's own is added as 64.
    """
    PER: tl.constexpr = 32 // BITS
    W: tl.constexpr = K // PER
    MIDDLE: tl.constexpr = 0 if KIND == MINIMUMS else 1 << (BITS - 1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (n < (N + 15) // 16 * 16)[None, :]
    base = (n // 16).to(tl.int64)[None, :] * (W * 16) + (n % 16)[None, :]
    group_base = (n // 16)[None, :] * (K // GROUP * 16) + (n % 16)[None, :]
    sums = tl.zeros((BW, BN), tl.float32)
    others = tl.zeros((BW, BN), tl.float32)
    squares = tl.zeros((BW, 1), tl.float32)
    for at in tl.static_range(0, W, BW):
        k = at + tl.arange(0, BW)[:, None]
        real = k < W
        keep = real & inside
        mine = tl.load(words + base + k * 16, mask=keep, other=0)
        part = tl.zeros((BW, BN), tl.float32)
        if SWIGLU:
            theirs = tl.load(gate_words + base + k * 16, mask=keep, other=0)
            gate_part = tl.zeros((BW, BN), tl.float32)
        total = tl.zeros((BW, 1), tl.float32)
        for i in tl.static_range(PER):
            column = k * PER + i
            if ORDER:
                column = tl.load(order + column, mask=real, other=0)
            values = tl.load(x + column, mask=real, other=0.0).to(tl.float32)
            if NORM:
                squares += values * values
                values *= tl.load(norm + column, mask=real, other=0.0).to(tl.float32)
            if KIND != SYMMETRIC:
                total += values
            # a power of two: exact
            values *= 1.0 / (1 << ((BITS * i) % 16))
            part += code_in_place(mine, i, magic, BITS, MIDDLE) * values
            if SWIGLU:
                gate_part += code_in_place(theirs, i, magic, BITS, MIDDLE) * values
        where = group_base + k // (GROUP // PER) * 16
        sums += _group(scales, extra, part, total, where, keep, BITS, KIND)
        if SWIGLU:
            others += _group(gate_scales, gate_extra, gate_part, total, where, keep, BITS, KIND)
    done, second = tl.sum(sums, 0), tl.sum(others, 0)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares) / K + eps)
        done *= factor
        second *= factor
    finish(done, second, n, n < N, bias + n, residual, y, BIAS, RESIDUAL, SWIGLU)
