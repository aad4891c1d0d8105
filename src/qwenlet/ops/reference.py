"""Every quantized op in plain PyTorch: the definition of correct, and what runs where there is no kernel.

Dimension letters: M rows, N outputs, K inputs, G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwenlet.ops.packing import QuantTensor

# Largest codes of activations: for four-bit weights a byte does; eight-bit weights show the difference (int8 lost 0.85
# percent of the demo's perplexity with a byte), and their kernels wait for memory anyway.
LEVELS = {4: 127, 8: 127 * 128}


def quantize_rows(x: Tensor, group_size: int, levels: int = 127) -> tuple[Tensor, Tensor]:
    """Rounds activations to whole numbers, symmetric, one scale per row and group, as the integer kernels do.

    Args:
        x: [..., K] float.
    Returns:
        codes [..., K] from -levels to levels, half to even, int8 or int16; scales [..., G] float32, the group's largest
        magnitude / levels. A group with an infinity or a NaN has codes of 0 and a scale of NaN.
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1)
    scales = (largest * (1.0 / levels)).where(largest.isfinite(), torch.nan)
    # a true division: torch makes 127.0 / tensor a product with the reciprocal, which rounds twice
    usual = (largest > 0) & largest.isfinite()
    inverse = torch.where(usual, torch.full_like(largest, float(levels)) / largest, 0.0)
    codes = (
        (groups.where(usual[..., None], 0) * inverse[..., None])
        .round()
        .to(torch.int8 if levels == 127 else torch.int16)
    )
    return codes.flatten(-2), scales


def linear_int(x: Tensor, weight: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with activations rounded to `LEVELS`: [M, K] -> [M, N] float32.

    Whole numbers are multiplied and summed exactly within a group, groups in float32 in their order; so a row's
    result depends on that row alone.
    """
    if weight.order is not None:
        x = x[:, weight.order]
    codes, scales = quantize_rows(x, weight.group_size, LEVELS[weight.bits])
    groups = weight.shape[1] // weight.group_size
    a = codes.unflatten(-1, (groups, -1)).double()
    w = weight.codes.unflatten(-1, (groups, -1)).double()
    if weight.minimums is None:
        zeros = float(1 << (weight.bits - 1)) if weight.zeros is None else weight.zeros.double()[..., None]
        w = w - zeros
    total = torch.zeros(x.shape[0], weight.shape[0])
    for g in range(groups):
        dots = (a[:, g] @ w[:, g].T).float()  # exact: whole numbers far below 2^53
        total = torch.addcmul(total, dots, weight.scales[:, g].float() * scales[:, g, None])
        if weight.minimums is not None:
            sums = a[:, g].sum(-1, keepdim=True).float() * scales[:, g, None]
            total = torch.addcmul(total, sums, weight.minimums[:, g].float())
    return total if bias is None else total + bias.float()


def linear_float(x: Tensor, weight: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """The same with float activations: x is not rounded."""
    y = x.float() @ weight.dequantize().T
    return y if bias is None else y + bias.float()


def least_kept(share: float) -> int:
    """The least number of 32 bits whose entry dropout keeps."""
    return min(round(share * (1 << 32)), (1 << 32) - 1)


def kept(shape: tuple[int, ...] | torch.Size, seed: int, share: float) -> Tensor:
    """Bool of a shape: which entries dropout keeps, all but about `share` of them, by a number of each that depends on
    the seed and on its place alone (a multiply-xorshift mixer of 32 bits)."""
    count = math.prod(shape)
    whole = (1 << 32) - 1
    number = ((torch.arange(count) ^ (seed & whole)) * 0x9E3779B1) & whole
    number ^= number >> 16
    number = ((number + (seed >> 32)) & whole) * 0x7FEB352D & whole
    number ^= number >> 15
    number = number * 0x846CA68B & whole
    number ^= number >> 16
    return (number >= least_kept(share)).view(shape)
