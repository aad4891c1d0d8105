"""Words of four- and eight-bit codes as numbers, inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

# The bits of 2^23 in float32: or-ed with a whole number below 2^23 they are 2^23 plus that number. A GPU converts at a
# fraction of the speed at which it adds, and this takes one addition.
MAGIC = tl.constexpr(0x4B000000)
# kinds of groups: codes around the middle, around a zero point of their own, or above a minimum
SYMMETRIC, ZEROS, MINIMUMS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def code_of(words, i: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr):
    """Code i of each word less MIDDLE, exact in float32."""
    found = (words >> (BITS * i)) & ((1 << BITS) - 1)
    return (found | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)


@triton.jit
def code_in_place(words, i: tl.constexpr, magic, BITS: tl.constexpr, MIDDLE: tl.constexpr):
    """The same times 2^(BITS * i % 16): it stays at its place in the word's half, which saves most shifts.

    Where `magic` is an argument of the launch, masking and or-ing are one instruction: it holds but one constant.
    """
    half = words if BITS * i < 16 else words >> 16
    shift: tl.constexpr = (BITS * i) % 16
    found = half & (((1 << BITS) - 1) << shift)
    return (found | magic).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE * (1 << shift))


@triton.jit
def weights_of(words, scales, extra, i: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """What code i of each word is worth, float32; `extra` are zero points, or minimums, by KIND."""
    if KIND == SYMMETRIC:
        return code_of(words, i, BITS, 1 << (BITS - 1)) * scales
    elif KIND == ZEROS:
        return (code_of(words, i, BITS, 0) - extra) * scales
    else:
        return code_of(words, i, BITS, 0) * scales + extra


@triton.jit
def group_table(table, at, mask):
    """Scales, zero points or minimums as float32."""
    return tl.load(table + at, mask=mask, other=0.0).to(tl.float32)
