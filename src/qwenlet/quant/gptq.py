"""GPTQ (Frantar et al., 2022): codes for one linear's weight, chosen so that its outputs change least on given inputs.

Columns are rounded one after another; what rounding a column did to the outputs is made up for, as far as the inputs'
correlations allow, by the columns that are not rounded yet. The correlations are H = X^T X over the calibration's
inputs; the algorithm needs U, upper triangular, with U^T U = H^-1.

Unlike the published code, a group's scale is searched for with each column's error weighed by H's diagonal: on a small
real model (135 M parameters, 4 bits in groups of 64) that took a fifth off the KL divergence.

U comes from one Cholesky factor of H itself, with the columns reversed, and a triangular inverse: no explicit H^-1, so
float32 is enough. Columns that no calibration token touched are rounded, not zeroed.

Left out: where inputs come from (pipeline.py), files.

Dimension letters: M tokens, N outputs, K inputs, G = K / group_size groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenlet.errors import CheckpointError
from qwenlet.ops.packing import QuantTensor
from qwenlet.ops.rounding import group_scales

BLOCK = 128  # columns between two updates of all the rest; every group size divides it
_MOST_DAMPING = 1.0  # the Hessian's mean diagonal once more
_ROWS = 2048  # outputs at a time: a block of them stays in the cache, and a head needs no second copy of itself


class Hessian:
    """X^T X, summed over batches of inputs.

    Attributes:
        sum: [K, K] float32; tokens: M so far.
    """

    def __init__(self, columns: int) -> None:
        self.sum = torch.zeros(columns, columns)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x [M, K]."""
        x = x.float()
        self.sum.addmm_(x.T, x)
        self.tokens += x.shape[0]


@dataclass(frozen=True)
class Solution:
    """What GPTQ found for one weight.

    Attributes:
        weight: the codes.
        error: how far rounding moved the outputs, |X (W - Q)^T| / |X W^T| on the calibration, damping counted in.
        damp_percent: what was needed in the end; dead_columns: inputs that were 0 for every token.
    """

    weight: QuantTensor
    error: float
    damp_percent: float
    dead_columns: int


def gptq(
    weight: Tensor,
    hessian: Hessian,
    bits: int,
    group_size: int,
    *,
    sym: bool = True,
    mse: bool = True,
    desc_act: bool = False,
    static_groups: bool = False,
    damp_percent: float = 0.01,
) -> Solution:
    """Quantizes weight [N, K]; the options are QuantConfig's. Leaves its arguments as they are.

    Raises:
        CheckpointError: NaN or infinite weights or inputs, or a Hessian that no damping makes positive definite.
    """
    columns = weight.shape[1]
    if not bool(hessian.sum.isfinite().all()):
        raise CheckpointError(
            "its inputs hold NaN or infinite values on the calibration text",
            hint="the checkpoint is damaged, or an earlier layer overflows on this text",
        )
    diagonal = hessian.sum.diagonal()
    dead = int((diagonal == 0).sum())
    mean = float(diagonal.mean()) or 1.0
    importance = diagonal / mean + damp_percent
    order = torch.argsort(diagonal, descending=True, stable=True) if desc_act else torch.arange(columns)
    factor, used = _factor(hessian, order, damp_percent)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(columns), upper=True)

    parts, lost, total = [], 0.0, 0.0
    for rows in weight.split(_ROWS):
        w = rows.float()[:, order].T.contiguous()
        total += float((factor.T @ w).square().sum())
        grid = group_scales(rows, bits, group_size, sym, mse, importance) if static_groups else None
        part, loss = _round_rows(w, inverse, bits, group_size, sym, mse, grid, order, importance[order])
        parts.append(part)
        lost += loss
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    if static_groups:  # columns stay in the groups, and at the places, they had
        codes[:, order] = codes.clone()
    quantized = QuantTensor(
        bits, group_size, codes, scales, None if sym else zeros, order=order if desc_act and not static_groups else None
    )
    return Solution(quantized, math.sqrt(lost / total) if total else 0.0, used, dead)


def _factor(hessian: Hessian, order: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """R, upper triangular, with R R^T = H / M damped, columns in `order`; and the damping it took."""
    backwards = order.flip(0)
    h = hessian.sum[backwards[:, None], backwards] / max(1, hessian.tokens)
    diagonal = h.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean  # a dead column goes with no other, so that it is rounded alone
    added = 0.0
    while damp_percent < _MOST_DAMPING:
        diagonal += damp_percent * mean - added
        added = damp_percent * mean
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            return lower.flip(0, 1), damp_percent
        damp_percent *= 2
    raise CheckpointError(
        f"the Hessian of its inputs is not positive definite, damping up to {added / mean:.0%} did not help",
        hint="calibrate with more text, or round to nearest (method rtn)",
    )


def _round_rows(
    w: Tensor,
    inverse: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    mse: bool,
    grid: tuple[Tensor, Tensor | None] | None,
    order: Tensor,
    importance: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """The loop over columns, for some rows.

    Args:
        w: [K, N], columns in the order they are taken; overwritten.
        inverse: U [K, K].
        grid: scales and zeros of each column's own group, or None: they are found as groups begin.
        order: [K], the columns' numbers; importance: [K], how much each counts where a group's scale is found.
    Returns:
        (codes [N, K], scales [N, G], zeros [N, G]), and the squared distance of the outputs.
    """
    top = (1 << bits) - 1
    columns, rows = w.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    groups = columns // group_size
    scales = torch.empty(groups, rows, dtype=torch.float16)
    zeros = torch.full((groups, rows), 1 << (bits - 1), dtype=torch.uint8)
    if grid is not None:
        scales.copy_(grid[0].T)
        if grid[1] is not None:
            zeros.copy_(grid[1].T)
    group_of = (torch.arange(columns) if grid is None else order).div(group_size, rounding_mode="floor").tolist()
    loss = 0.0
    for start in range(0, columns, BLOCK):
        block = w[start : start + BLOCK]
        end = start + block.shape[0]
        u = inverse[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(block.shape[0]):
            group = group_of[start + i]
            if grid is None and i % group_size == 0:
                # what earlier columns passed on is in the block already
                counts = importance[start + i : start + i + group_size]
                found, zero = group_scales(block[i : i + group_size].T, bits, group_size, sym, mse, counts)
                scales[group] = found[:, 0]
                if zero is not None:
                    zeros[group] = zero[:, 0]
            scale, middle = scales[group].float(), zeros[group].float()
            code = (block[i] / scale).round_().add_(middle).clamp_(0, top)
            codes[start + i] = code
            torch.div(block[i] - (code - middle) * scale, u[i, i], out=errors[i])
            block[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        w[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
        loss += float(errors.square().sum())
    return (codes.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous()), loss
