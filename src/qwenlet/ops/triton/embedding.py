"""Rows of the embedding's table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenlet.ops.triton.interpreter import repair


def embed(
    ids: Tensor,
    table: Tensor,
    scales: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Token ids to hidden states, in one launch.

    Args:
        ids: [B] int32 or int64; below 0: the row is 0.
        table: [V, C] floats, or int8 codes with `scales` [V, C / group] float16.
        dtype: of the result; None: the table's (needed for codes).
        out: [B, C], written to.
    Returns:
        [B, C].
    """
    repair()
    assert all(part is None or part.is_contiguous() for part in (table, scales)), "tables on a device are contiguous"
    columns = table.shape[1]
    if out is None:
        assert dtype is not None or scales is None, "codes need a dtype to become"
        out = torch.empty(len(ids), columns, dtype=dtype or table.dtype, device=table.device)
    group = columns if scales is None else columns // scales.shape[1]
    _embed[(len(ids), -(-columns // 1024))](
        ids, table, table if scales is None else scales, out, columns, group,
        CODES=scales is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _embed(ids, table, scales, y, columns, group, CODES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token = tl.load(ids + row).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = (c < columns) & (token >= 0)
    values = tl.load(table + token * columns + c, mask=keep, other=0).to(tl.float32)
    if CODES:
        values *= tl.load(scales + token * (columns // group) + c // group, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * columns + c, values.to(y.dtype.element_ty), mask=c < columns)
