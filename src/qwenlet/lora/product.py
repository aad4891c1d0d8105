"""One node of autograd for a frozen linear and the low-rank part beside it.

    y = x W^T + b + scale * drop(x) A^T B^T

Composed of operators, every cast and every product of it would be a node that keeps something: bfloat16 copies of A
and B, what dropout left of x, the narrow rows. Here the inputs, their mask and the narrow rows are kept, and y goes
through a tape (ops/replay.py).

Dimension letters: M rows, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlet.linear import compute_dtype, product, tiles_back
from qwenlet.ops import cpu, replay
from qwenlet.ops.packing import Tiles


def adapted(
    x: Tensor, base: Tensor | Tiles, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, share: float = 0.0
) -> Tensor:
    """x [..., K] -> [..., N], in autocast's dtype where that is on.

    Args:
        base: the frozen weight [N, K], or in tiles; bias: [N], frozen, or None.
        a: [R, K]; b: [N, R], float32 as a rule.
        share: that dropout makes 0 of what A sees, at random; the rest as it is, so `scale` has to make up for it.
    """
    dtype = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    seed, mask = None, None
    if share and rows.device.type == "cpu":
        # torch's generator takes a fifth of a step for all entries; it gives a seed, and what was dropped is not kept
        seed = int(torch.randint(1 << 62, ()))
    elif share:
        mask = torch.rand(rows.shape, device=rows.device) >= share
    weight = base.to(dtype) if isinstance(base, Tensor) else None
    added = None if bias is None else bias.to(dtype if weight is not None else torch.float32)
    tiles = base if isinstance(base, Tiles) else None
    y = _Adapted.apply(rows, weight, tiles, added, a, b, scale, mask, seed, share)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Adapted(torch.autograd.Function):
    """x [M, K], weight [N, K] or None and then tiles, bias [N] or None, A [R, K], B [N, R], mask [M, K] or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, tiles: Tiles | None, bias: Tensor | None, a: Tensor, b: Tensor,
        scale: float, mask: Tensor | None, seed: int | None, share: float,
    ) -> Tensor:  # fmt: skip
        def result() -> Tensor:
            if weight is not None:
                y = F.linear(x, weight, bias)
            else:
                assert tiles is not None, "a linear has a weight or tiles"
                y = product(x, tiles, bias)
            return y.addmm_(narrow, b.to(x.dtype).t(), alpha=scale)

        with torch.autocast(x.device.type, enabled=False):
            ctx.tiles, ctx.scale, ctx.seed, ctx.share = tiles, scale, seed, share
            narrow = replay.once(lambda: F.linear(_kept(ctx, x, mask), a.to(x.dtype)))
            ctx.save_for_backward(x, weight, a, b, narrow, mask)
            return replay.once(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, narrow, mask = ctx.saved_tensors
        g = grads[0]
        with torch.autocast(g.device.type, enabled=False):
            of_narrow = (g @ b.to(g.dtype)).mul_(ctx.scale)  # (M, R)
            of_a = of_b = of_x = None
            if ctx.needs_input_grad[4]:
                of_a = (of_narrow.t() @ _kept(ctx, x, mask)).to(a.dtype)
            if ctx.needs_input_grad[5]:
                of_b = (g.t() @ narrow).to(b.dtype).mul_(ctx.scale)
            if ctx.needs_input_grad[0]:
                of_x = cpu.rows_back(g, weight) if weight is not None else tiles_back(g, ctx.tiles)
                of_x = _kept(ctx, of_narrow @ a.to(g.dtype), mask, onto=of_x)
        return of_x, None, None, None, of_a, of_b, None, None, None, None


def _kept(ctx: Any, x: Tensor, mask: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """What dropout leaves of x, or `onto` with that added in place."""
    if ctx.seed is not None:
        return cpu.drop(x, ctx.seed, ctx.share, onto)
    left = x if mask is None else torch.where(mask, x, 0.0)
    return left if onto is None else onto.add_(left)
