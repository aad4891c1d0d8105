"""One step of attention over pages: rotation, storing, and every key a row has seen, in one launch.

A row's past is cut into splits of whole pages, one program each per key/value head, so that one long row keeps all of a
GPU busy. How it is cut depends on the row's position alone, so a row's answer is the same bits beside any others. The
split with the newest page also rotates and stores the new key and value, and answers from them out of its registers; no
program reads what another has just written. The last program of a row and head to finish adds up what all have found.

Dimension letters: B rows, H query heads, G key/value heads, D head size, P pages of a row's table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenlet.ops.pages import CachePages
from qwenlet.ops.triton.interpreter import repair
from qwenlet.ops.triton.scratch import Scratch

_PROGRAMS = 256  # splits of one row, all heads together: two for each of a Hopper's processors
_HEADS_OF_A_PRODUCT = 16  # fewest rows that tensor cores multiply


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor | None,
    pages: CachePages,
    tables: Tensor,
    positions: Tensor,
    *,
    heads: int,
    scratch: Scratch,
    out: Tensor | None = None,
) -> Tensor:
    """Rotates queries and keys, stores the keys and values in their page, and answers the queries from all keys up to
    their own.

    Args:
        qkv: [B, (H + 2 G) * D], queries, keys, values side by side; D a power of two from 16 to 256.
        cos, sin: [B, D / 2] float32 of each row's position.
        logn: [B] float32, what a row's query is multiplied with; None: 1.
        pages: row by row, [pages, G, page, D] in qkv's dtype, or int8 with scales.
        tables: [B, P] int32, the pages of each row in order.
        positions: [B] int32, the place of the new token in its row; below 0: nothing is stored, the answer is 0.
        heads: H.
        out: [B, H * D], written to.
    Returns:
        [B, H * D] in qkv's dtype.
    """
    repair()
    rows = len(qkv)
    _, groups, page, dim = pages.k.shape
    assert qkv.shape == (rows, (heads + 2 * groups) * dim), f"qkv is {tuple(qkv.shape)} for {heads} heads of {dim}"
    assert dim in (16, 32, 64, 128, 256), f"heads of {dim}, expected a power of two from 16 to 256"
    assert pages.k.dtype in (qkv.dtype, torch.int8), f"pages in {pages.k.dtype} for {qkv.dtype}"
    for part in (qkv, cos, sin, pages.k, pages.v, tables, positions):
        assert part.is_contiguous(), f"a part has strides {part.stride()}"
    each, splits = heads // groups, splits_of(groups)
    assert rows * heads * splits * (dim + 2) <= len(scratch.partials), f"scratch is too small for {rows} rows"
    assert rows * groups <= len(scratch.counters), f"scratch has {len(scratch.counters)} counters"
    y = qkv.new_empty(rows, heads * dim) if out is None else out
    int8 = pages.k_scales is not None
    _attend[(rows, groups, splits)](
        qkv, cos, sin, cos if logn is None else logn, pages.k, pages.v,
        pages.k_scales if int8 else cos, pages.v_scales if int8 else cos, tables, positions, y,
        scratch.partials, scratch.counters, tables.shape[1], dim**-0.5,
        H=heads, G=groups, D=dim, PAGE=page, SPLITS=splits, EACH=each,
        Q=1 if each == 1 else max(_HEADS_OF_A_PRODUCT, 1 << (each - 1).bit_length()),
        INT8=int8, LOGN=logn is not None, num_warps=4,
    )  # fmt: skip
    return y


def splits_of(groups: int) -> int:
    """Into how many splits the past of a row is cut at most: by the model's shape alone, never by the company."""
    return min(64, max(8, 1 << (_PROGRAMS // groups).bit_length() - 1))


@triton.jit
def _turned(x, at, partner, d, cos, sin, keep, D: tl.constexpr):
    """x[at] rotated: dimension d turns with `partner`, half a head away. Rounded to x's dtype, as published."""
    angle = d % (D // 2)
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    own = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=keep, other=0.0).to(tl.float32)
    return tl.where(d < D // 2, own * c - other * s, own * c + other * s).to(x.dtype.element_ty)


@triton.jit
def _put(new, table, scales, slot, d, D: tl.constexpr, INT8: tl.constexpr):
    """Stores new [1, D] in its slot, and gives it back in float32 as the slot holds it."""
    values = new.to(tl.float32)
    if INT8:
        largest = tl.max(tl.abs(values))
        scale = largest * (1.0 / 127)
        inverse = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)
        # 1.5 * 2^23: adding it leaves no room for a fraction, and rounds half to even
        codes = (values * inverse + 12582912.0) - 12582912.0
        tl.store(table + slot * D + d, codes.to(tl.int8))
        tl.store(scales + slot, scale)
        return codes * scale
    else:
        tl.store(table + slot * D + d, new)
        return values


@triton.jit
def _attend(
    qkv, cos, sin, logn, k_pages, v_pages, k_scales, v_scales, tables, positions, y, partials, counters,
    width, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, EACH: tl.constexpr,
    Q: tl.constexpr, INT8: tl.constexpr, LOGN: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    used = tl.where(position >= 0, position // PAGE + 1, 0)
    span = tl.maximum((used + SPLITS - 1) // SPLITS, 2)
    parts = (used + span - 1) // span
    d = tl.arange(0, D)[None, :]
    q_head = tl.arange(0, Q)[:, None]
    real = q_head < EACH
    answer = y + row * (H * D) + (head * EACH + q_head) * D + d
    if used == 0 and split == 0:
        tl.store(answer, tl.zeros((Q, D), y.dtype.element_ty), mask=real & (d >= 0))
    if split < parts:
        # 1. the queries
        x = qkv + row * ((H + 2 * G) * D)
        cos_row, sin_row = cos + row * (D // 2), sin + row * (D // 2)
        far = (d + D // 2) % D
        q_at = (head * EACH + q_head) * D
        q = _turned(x, q_at + d, q_at + far, d, cos_row, sin_row, real & (d >= 0), D)
        if LOGN:
            # the model multiplies in its dtype: both are rounded to it, and the product
            factor = tl.load(logn + row).to(q.dtype).to(tl.float32)
            q = (q.to(tl.float32) * factor).to(q.dtype)
        q32 = q.to(tl.float32)

        # 2. the newest key, where it is this split's
        best = tl.full((Q, 1), -float("inf"), tl.float32)
        total = tl.zeros((Q, 1), tl.float32)
        sums = tl.zeros((Q, D), tl.float32)
        if split == parts - 1:
            k_at = (H + head) * D
            new_k = _turned(x, k_at + d, k_at + far, d, cos_row, sin_row, d >= 0, D)
            new_v = tl.load(x + (H + G + head) * D + d)
            page = tl.load(tables + row * width + position // PAGE).to(tl.int64)
            slot = (page * G + head) * PAGE + position % PAGE
            k = _put(new_k, k_pages, k_scales, slot, d, D, INT8)
            v = _put(new_v, v_pages, v_scales, slot, d, D, INT8)
            best = tl.sum(q32 * k, 1)[:, None] * scale
            total += 1.0
            sums += v

        # 3. the older ones, a page at a time
        t = tl.arange(0, PAGE)
        for number in tl.range(split * span, tl.minimum((split + 1) * span, used), num_stages=3):
            page = tl.load(tables + row * width + number).to(tl.int64)
            first = (page * G + head) * PAGE
            older = number * PAGE + t < position
            keep = older[:, None] & (d >= 0)
            k = tl.load(k_pages + first * D + t[:, None] * D + d, mask=keep, other=0)
            v = tl.load(v_pages + first * D + t[:, None] * D + d, mask=keep, other=0)
            if Q == 1:
                scores = tl.sum(k.to(tl.float32) * q32, 1)[None, :]
            else:
                scores = tl.dot(q, tl.trans(k.to(tl.float32).to(q.dtype)), input_precision="ieee")
            scores *= scale
            if INT8:
                scores *= tl.load(k_scales + first + t, mask=older, other=0.0)[None, :]
            scores = tl.where(older[None, :], scores, -float("inf"))
            peak = tl.maximum(best, tl.max(scores, 1)[:, None])
            shrink = tl.exp(best - peak)
            weights = tl.exp(scores - peak)
            total = total * shrink + tl.sum(weights, 1)[:, None]
            if INT8:
                weights *= tl.load(v_scales + first + t, mask=older, other=0.0)[None, :]
            if Q == 1:
                found = tl.sum(tl.reshape(weights, (PAGE, 1)) * v.to(tl.float32), 0)[None, :]
            else:
                found = tl.dot(weights.to(q.dtype), v.to(tl.float32).to(q.dtype), input_precision="ieee")
            sums = sums * shrink + found
            best = peak

        # 4. the answer, or a part of it
        if parts == 1:
            tl.store(answer, (sums / total).to(y.dtype.element_ty), mask=real & (d >= 0))
        else:
            one = (row * G + head) * SPLITS
            heap = partials + one * (EACH * (D + 2))
            sums_at = q_head * D + d
            ends_at = EACH * D + q_head * 2
            mine = heap + split * (EACH * (D + 2))
            tl.store(mine + sums_at, sums, mask=real & (d >= 0))
            tl.store(mine + ends_at, best, mask=real)
            tl.store(mine + ends_at + 1, total, mask=real)
            tl.debug_barrier()  # all of it is written before the counter says so
            counter = counters + row * G + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
                every = tl.arange(0, SPLITS)[None, :]
                there = real & (every < parts)
                ends = heap + every * (EACH * (D + 2)) + ends_at
                bests = tl.load(ends, mask=there, other=-float("inf"), cache_modifier=".cg")
                totals = tl.load(ends + 1, mask=there, other=0.0, cache_modifier=".cg")
                peak = tl.max(bests, 1)[:, None]
                peak = tl.where(real, peak, 0.0)
                whole = tl.where(real, tl.sum(totals * tl.exp(bests - peak), 1)[:, None], 1.0)
                sums = tl.zeros((Q, D), tl.float32)
                for part in tl.range(0, SPLITS, loop_unroll_factor=8):  # loads of eight at a time
                    at = heap + part * (EACH * (D + 2))
                    some = real & (part < parts)
                    weight = tl.exp(tl.load(at + ends_at, mask=some, other=-float("inf"), cache_modifier=".cg") - peak)
                    sums += weight * tl.load(at + sums_at, mask=some & (d >= 0), other=0.0, cache_modifier=".cg")
                tl.store(answer, (sums / whole).to(y.dtype.element_ty), mask=real & (d >= 0))
                tl.store(counter, 0)
