"""Products of a few rows with a weight, on tensor cores: every weight is still read once.

Rows are padded to BM (16, 32 or 64). Where a weight has few outputs, SPLIT programs share the columns: each writes its
sums, and the last one to do so adds all of them, in their order, so that the result is the same bits every time.
Weights in codes are turned into x's dtype first; sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenlet.ops.triton.codes import SYMMETRIC, group_table, weights_of


@triton.jit
def _factors(x, m, rows, eps, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """[BM, 1] float32: what the norm multiplies each row with."""
    squares = tl.zeros((BM, BK), tl.float32)
    for at in range(0, K, BK):
        k = at + tl.arange(0, BK)[None, :]
        values = tl.load(x + m * K + k, mask=(m < rows) & (k < K), other=0.0).to(tl.float32)
        squares += values * values
    return tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]


@triton.jit
def _normed(values, factor, norm, column, keep):
    """As published: rounded to the dtype before the norm's weight multiplies."""
    weight = tl.load(norm + column, mask=keep, other=0.0).to(tl.float32)
    return ((values.to(tl.float32) * factor).to(values.dtype).to(tl.float32) * weight).to(values.dtype)


@triton.jit
def _conclude(
    sums, others, m, n, rows, bias, residual, y, partials, counters,
    N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Adds up what SPLIT programs found, then bias, activation and residual."""
    last = True
    if SPLIT > 1:
        EACH: tl.constexpr = 2 if SWIGLU else 1
        block = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        first = partials + tl.program_id(0) * (SPLIT * EACH * BM * BN) + block
        own = first + tl.program_id(1) * (EACH * BM * BN)
        tl.store(own, sums)
        if SWIGLU:
            tl.store(own + BM * BN, others)
        tl.debug_barrier()  # all of it is written before the counter says so
        last = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1
        if last:
            sums = tl.zeros((BM, BN), tl.float32)
            others = tl.zeros((BM, BN), tl.float32)
            for part in range(SPLIT):
                at = first + part * (EACH * BM * BN)
                sums += tl.load(at, cache_modifier=".cg")
                if SWIGLU:
                    others += tl.load(at + BM * BN, cache_modifier=".cg")
            tl.store(counters + tl.program_id(0), 0)
    if last:
        keep = (m < rows) & (n < N)
        if BIAS:
            sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if SWIGLU:
            sums *= others * tl.sigmoid(others)
        if RESIDUAL:
            sums += tl.load(residual + m * N + n, mask=keep, other=0.0).to(tl.float32)
        tl.store(y + m * N + n, sums.to(y.dtype.element_ty), mask=keep)


@triton.jit
def float_rows(
    x, norm, weight, gate, bias, residual, y, partials, counters, rows, eps,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Weights [N, K] in floats, row by row."""
    m = tl.arange(0, BM)[:, None]
    n = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    SHARE: tl.constexpr = (K + BK * SPLIT - 1) // (BK * SPLIT) * BK
    factor = 1.0
    if NORM:
        factor = _factors(x, m, rows, eps, K, BM, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    others = tl.zeros((BM, BN), tl.float32)
    start = tl.program_id(1) * SHARE
    for step in range(0, SHARE, BK):
        k = start + step + tl.arange(0, BK)
        across, down = k[None, :], k[:, None]
        values = tl.load(x + m * K + across, mask=(m < rows) & (across < K), other=0.0)
        if NORM:
            values = _normed(values, factor, norm, across, across < K)
        keep = (n < N) & (down < K)
        where = n.to(tl.int64) * K + down
        sums = tl.dot(values, tl.load(weight + where, mask=keep, other=0.0), sums, input_precision="ieee")
        if SWIGLU:
            others = tl.dot(values, tl.load(gate + where, mask=keep, other=0.0), others, input_precision="ieee")
    _conclude(sums, others, m, n, rows, bias, residual, y, partials, counters,
              N, BM, BN, SPLIT, BIAS, RESIDUAL, SWIGLU)  # fmt: skip


@triton.jit
def _columns(values, i: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, PER: tl.constexpr):
    """[BM, BW * PER] -> [BM, BW]: column i of each word. Only registers move."""
    even, odd = tl.split(tl.reshape(values, (BM, BW, PER // 2, 2)))
    found = odd if i % 2 else even
    even, odd = tl.split(tl.reshape(found, (BM, BW, PER // 4, 2)))
    found = odd if i // 2 % 2 else even
    if PER == 8:
        even, odd = tl.split(tl.reshape(found, (BM, BW, 2)))
        found = odd if i // 4 else even
    return tl.reshape(found, (BM, BW))


@triton.jit
def codes_rows(
    x, norm, order, words, scales, extra, gate_words, gate_scales, gate_extra, bias, residual, y,
    partials, counters, rows, eps,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, SPLIT: tl.constexpr, ORDER: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Weights in tiles. Code i of all words is multiplied with column i of all words, one product each: a sum does not
    mind its order."""
    PER: tl.constexpr = 32 // BITS
    W: tl.constexpr = K // PER
    SHARE: tl.constexpr = (W + BW * SPLIT - 1) // (BW * SPLIT) * BW
    m = tl.arange(0, BM)[:, None]
    n = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    inside = n < (N + 15) // 16 * 16
    base = (n // 16).to(tl.int64) * (W * 16) + n % 16
    group_base = n // 16 * (K // GROUP * 16) + n % 16
    factor = 1.0
    if NORM:
        factor = _factors(x, m, rows, eps, K, BM, BW * PER)
    sums = tl.zeros((BM, BN), tl.float32)
    others = tl.zeros((BM, BN), tl.float32)
    start = tl.program_id(1) * SHARE
    for step in range(0, SHARE, BW):
        at = start + step
        column = at * PER + tl.arange(0, BW * PER)[None, :]
        real = column < K
        if ORDER:
            column = tl.load(order + column, mask=real, other=0)
        values = tl.load(x + m * K + column, mask=(m < rows) & real, other=0.0)
        if NORM:
            values = _normed(values, factor, norm, column, real)
        w = at + tl.arange(0, BW)[:, None]
        keep = inside & (w < W)
        where, group = base + w * 16, group_base + w // (GROUP // PER) * 16
        mine = tl.load(words + where, mask=keep, other=0)
        s = group_table(scales, group, keep)
        e = s
        if KIND != SYMMETRIC:
            e = group_table(extra, group, keep)
        if SWIGLU:
            theirs = tl.load(gate_words + where, mask=keep, other=0)
            gate_s = group_table(gate_scales, group, keep)
            gate_e = gate_s
            if KIND != SYMMETRIC:
                gate_e = group_table(gate_extra, group, keep)
        for i in tl.static_range(PER):
            part = _columns(values, i, BM, BW, PER)
            sums = tl.dot(part, weights_of(mine, s, e, i, BITS, KIND).to(x.dtype.element_ty), sums,
                          input_precision="ieee")  # fmt: skip
            if SWIGLU:
                others = tl.dot(part, weights_of(theirs, gate_s, gate_e, i, BITS, KIND).to(x.dtype.element_ty), others,
                                input_precision="ieee")  # fmt: skip
    _conclude(sums, others, m, n, rows, bias, residual, y, partials, counters,
              N, BM, BN, SPLIT, BIAS, RESIDUAL, SWIGLU)  # fmt: skip
