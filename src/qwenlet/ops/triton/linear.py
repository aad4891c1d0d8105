"""Products with weights: floats row by row, or four and eight bits in tiles.

A weight is a Tensor [N, K] in bfloat16, float16 or float32, or `Tiles` of 4 or 8 bits as `on_device` gives them.

Dimension letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlet.ops.packing import Tiles, from_tiles
from qwenlet.ops.triton.scratch import Scratch

Weight = Tensor | Tiles


def on_device(tiles: Tiles, device: torch.device | str) -> Tiles:
    """The same weight where the kernels read it; the columns' order becomes int32."""

    def moved(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(device)

    weight, scales = tiles.weight.to(device), tiles.scales.to(device)
    order = None if tiles.order is None else tiles.order.to(device, torch.int32)
    return replace(
        tiles, weight=weight, scales=scales, zeros=moved(tiles.zeros), minimums=moved(tiles.minimums), order=order
    )


def norm_linear(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    scratch: Scratch,
    out: Tensor | None = None,
) -> Tensor:
    """RMSNorm(x) W^T + b in one launch, or x W^T + b where `norm` is None.

    Args:
        x: [M, K] in bfloat16, float16 or float32, M at most `ROWS`.
        norm: [K], the norm's weight.
        bias: [N] of any float dtype.
        out: [M, N] of any float dtype, written to; None: a new one in x's dtype.
    Returns:
        [M, N]; sums are in float32.
    """
    n = x if norm is None else _normed(x, norm, eps)
    y = linear(n, weight, bias)
    return y if out is None else out.copy_(y)


def linear_add(x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None, *, scratch: Scratch) -> Tensor:
    """residual += x W^T + b in one launch; x [M, K], residual [M, N] in x's dtype, changed and given back."""
    return residual.add_(linear(x, weight, bias))


def norm_swiglu(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    up: Weight,
    gate: Weight,
    *,
    scratch: Scratch,
    out: Tensor | None = None,
) -> Tensor:
    """(n U^T) * silu(n G^T) for n = RMSNorm(x), in one launch: x [M, K] -> [M, N] in x's dtype.

    `up` and `gate` are w1 and w2 of the published model, both of one kind and shape.
    """
    n = x if norm is None else _normed(x, norm, eps)
    y = linear(n, up) * F.silu(linear(n, gate))
    return y if out is None else out.copy_(y)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, scratch: Scratch | None = None) -> Tensor:
    """x W^T + b for any number of rows: x [M, K] -> [M, N] in x's dtype.

    Many rows are multiplied by torch, with a weight in codes turned into x's dtype first. Without `scratch` a few are,
    too.
    """
    b = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype) if isinstance(weight, Tensor) else dequantize(weight, x.dtype), b)


def dequantize(weight: Tiles, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`, columns in the inputs' own order."""
    order = None if weight.order is None else weight.order.long()
    return from_tiles(replace(weight, order=order)).dequantize().to(dtype)


def _normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).type_as(x) * norm
