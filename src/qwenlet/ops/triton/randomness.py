"""Numbers that depend on (seed, choice, position) alone, on the device: `sampling.uniform`, bit for bit.

Philox 4x64 (Salmon et al., SC 2011), ten rounds: nothing is kept between draws, so a step can be launched before the
one before it is known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64


def uniform(seeds: Tensor, choices: Tensor, positions: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A number in [0, 1) for each row, in one launch.

    Args:
        seeds: [B] int64, a seed's 64 bits.
        choices, positions: [B] int32.
        out: [B] float64, written to.
    Returns:
        [B] float64.
    """
    if out is None:
        out = torch.empty(len(seeds), dtype=torch.float64, device=seeds.device)
    _uniform[(-(-len(seeds) // _BLOCK),)](seeds, choices, positions, out, len(seeds), BLOCK=_BLOCK, num_warps=2)
    return out


@triton.jit
def _uniform(seeds, choices, positions, out, count, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = row < count
    key = tl.load(seeds + row, mask=keep, other=0).to(tl.uint64)
    # numpy's generator counts before it draws
    a = tl.load(positions + row, mask=keep, other=0).to(tl.uint64) + 1
    b = tl.load(choices + row, mask=keep, other=0).to(tl.uint64)
    zero = tl.zeros((BLOCK,), tl.uint64)
    second_key, c, d = zero, zero, zero
    first_factor, second_factor = zero + 0xD2E7470EE14C6C93, zero + 0xCA5A826395121157
    for _ in tl.static_range(10):
        high, low = tl.umulhi(first_factor, a), first_factor * a
        other_high, other_low = tl.umulhi(second_factor, c), second_factor * c
        a, b, c, d = other_high ^ b ^ key, other_low, high ^ d ^ second_key, low
        key += 0x9E3779B97F4A7C15
        second_key += 0xBB67AE8584CAA73B
    tl.store(out + row, (a >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16, mask=keep)
