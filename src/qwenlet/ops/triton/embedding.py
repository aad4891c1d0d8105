"""Rows of the embedding's table."""

from __future__ import annotations

import torch
from torch import Tensor


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
    rows = table[ids.long().clamp(min=0)].float()
    if scales is not None:
        each = scales[ids.long().clamp(min=0)].float()
        rows = (rows.unflatten(1, (each.shape[1], -1)) * each[..., None]).flatten(1)
    rows = torch.where(ids[:, None] >= 0, rows, 0.0)
    if out is not None:
        return out.copy_(rows)
    return rows.to(table.dtype if dtype is None else dtype)
