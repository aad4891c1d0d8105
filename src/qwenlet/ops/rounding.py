"""Weights to codes: the scale of each group, and the code of each weight at that scale.

Two ways to a scale. Plain: the range of the group's weights, as GPTQ files are usually made. With `mse`: a few clipped
ranges are tried; for each the scale is fitted to its codes by least squares, and the one with the least squared error
stays. GPTQ's published search (AutoGPTQ, `Quantizer.find_params`) tries 80 ranges by the sum of |error|^2.4 and fits
nothing; the fit makes 8 tries enough, as it does for llama.cpp's `make_qx_quants`. Like there, a symmetric scale has a
sign: the side with one code more goes to the group's largest weight.

Codes are made for the float16 scales that are stored. Left out: what looks at activations (checkpoint/importance.py,
quant/gptq.py).

Dimension letters: N outputs, K inputs, G = K / group_size groups, R rows of a slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenlet.errors import CheckpointError
from qwenlet.ops.packing import QuantTensor

SLICE = 1 << 18  # weights at a time: the search's buffers stay in the cache, and large tensors need no second copy
_GPU_SLICE = 1 << 23  # ... where a launch is what costs

# Shares of a group's range that are tried.
_SHARES = {4: (1.1, 1.04, 0.98, 0.92, 0.87, 0.82, 0.76, 0.7), 8: (1.0,)}

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16


def group_scales(
    weight: Tensor,
    bits: int,
    group_size: int,
    sym: bool = True,
    mse: bool = True,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scale, and unless symmetric the zero point, of each group of columns.

    Args:
        weight: [N, K] of any float type; group_size divides K.
        bits: 4 or 8.
        importance: [K] above 0: how much a column's squared error counts in the search.
    Returns:
        scales [N, G] float16, never 0, some negative with `mse`; zeros [N, G] uint8 from 1 to 2^bits - 1, or None.
    Raises:
        CheckpointError: NaN or infinite weights, or some so large that float16 can't hold their scale.
    """
    groups = weight.shape[1] // group_size
    scales = torch.empty(weight.shape[0], groups, dtype=torch.float16, device=weight.device)
    zeros = None if sym else torch.empty_like(scales, dtype=torch.uint8)
    counts = None if importance is None else importance.to(weight.device).view(groups, group_size)
    for piece in _slices(weight):
        x = weight[piece].float().unflatten(1, (groups, -1))
        scale, zero = (_symmetric_range if sym else _full_range)(x, bits, mse)
        scales[piece] = _storable(_fit(x, scale, zero, bits, counts) if mse else scale)
        if zeros is not None:
            zeros[piece] = zero.to(torch.uint8)
    return scales, zeros


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """The nearest code of each weight, [N, K] uint8, at scales and zeros [N, G] as `group_scales` gives them."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for piece in _slices(weight):
        x = weight[piece].float().unflatten(1, (scales.shape[1], -1))
        middle = float(1 << (bits - 1)) if zeros is None else zeros[piece].float()[..., None]
        nearest = x.div(scales[piece].float()[..., None]).round_().add_(middle).clamp_(0, (1 << bits) - 1)
        codes[piece] = nearest.flatten(1).to(torch.uint8)
    return codes


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    sym: bool = True,
    mse: bool = True,
    importance: Tensor | None = None,
) -> QuantTensor:
    """The quick way to quantize: each weight to its nearest code, none making up for another. As `group_scales`."""
    scales, zeros = group_scales(weight, bits, group_size, sym, mse, importance)
    return QuantTensor(bits, group_size, encode(weight, scales, zeros, bits), scales, zeros)


def _slices(weight: Tensor) -> list[slice]:
    step = max(1, (_GPU_SLICE if weight.is_cuda else SLICE) // weight.shape[1])
    return [slice(at, min(at + step, weight.shape[0])) for at in range(0, weight.shape[0], step)]


def _symmetric_range(x: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """[R, G, group] -> scales [R, G] that reach the largest weight, zero point []."""
    half = 1 << (bits - 1)
    low, high = torch.aminmax(x, dim=-1)
    zero = torch.tensor(float(half))
    if not signed:
        return torch.maximum(-low, high) * (2.0 / (2 * half - 1)), zero
    # the lowest code, -half, has no positive twin: it goes to the side of the largest weight
    return torch.where(-low >= high, -low, -high) / half, zero


def _full_range(x: Tensor, bits: int, _: bool) -> tuple[Tensor, Tensor]:
    """[R, G, group] -> scales [R, G], zero points [R, G] of whole numbers."""
    top = (1 << bits) - 1
    low, high = torch.aminmax(x, dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)  # a weight of 0 stays 0
    scale = (high - low) / top
    zero = torch.where(scale > 0, -low / scale, float(1 << (bits - 1))).round()
    # GPTQ v1 files can't say 0, so weights that are all positive have one code less
    return torch.where(zero == 0, high / (top - 1), scale), zero.clamp(1, top)


def _fit(x: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """The best of a few shares of `scale`, each fitted to its codes: [R, G, group], [R, G] -> [R, G].

    With codes q fixed the squared error of s * q is least at s = <x, q> / <q, q>: it is |x|^2 - <x, q>^2 / <q, q>.
    `importance` [G, group] weighs the products.
    """
    # numbers where all groups share them: torch clamps faster with those
    low: Any = -zero[..., None] if zero.ndim else -zero.item()
    high: Any = low + (1 << bits) - 1
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)[..., None]
    shares = _SHARES[bits]
    dots, squares = torch.empty(2, len(shares), *scale.shape, device=x.device)
    weighted = x if importance is None else x * importance
    q, product = torch.empty_like(x), torch.empty_like(x)
    for i, share in enumerate(shares):
        torch.mul(x, inverse / share, out=q).round_()
        q.clamp_(low, high)
        torch.sum(torch.mul(weighted, q, out=product), -1, out=dots[i])
        q.square_()
        torch.sum(q if importance is None else q.mul_(importance), -1, out=squares[i])
    # where all codes are 0 there is nothing to fit
    gain, best = (dots.square() / squares).nan_to_num(0.0).max(0)
    fitted = (dots / squares).gather(0, best[None])[0]
    return torch.where(gain > 0, fitted, scale)


def _storable(scale: Tensor) -> Tensor:
    """float32 -> float16, kept away from 0."""
    if not bool((scale.abs() <= _LARGEST).all()):  # NaN fails too
        raise CheckpointError(
            "the weight holds NaN, infinite or huge values (a float16 scale reaches 65504), which can't be quantized",
            hint="check the checkpoint: a trained model's weights stay far below 1000",
        )
    return torch.where(scale.abs() < _SMALLEST, _SMALLEST, scale).half()
