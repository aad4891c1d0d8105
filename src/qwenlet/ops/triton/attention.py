"""One step of attention over pages: rotation, storing, and every key a row has seen.

Dimension letters: B rows, H query heads, G key/value heads, D head size, P pages of a row's table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenlet.ops.attention import causal_attention_pages
from qwenlet.ops.pages import CachePages
from qwenlet.ops.reference import quantize_rows
from qwenlet.ops.triton.scratch import Scratch


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
    their own, in one launch.

    Args:
        qkv: [B, (H + 2 G) * D], queries, keys, values side by side; D a power of two from 16 to 256.
        cos, sin: [B, D / 2] float32 of each row's position.
        logn: [B] float32, what a row's query is multiplied with; None: 1.
        pages: row by row, [pages, G, 64, D] in qkv's dtype or int8 with scales.
        tables: [B, P] int32, the pages of each row in order.
        positions: [B] int32, the place of the new token in its row; below 0: nothing is stored, the answer is 0.
        heads: H.
        out: [B, H * D], written to.
    Returns:
        [B, H * D] in qkv's dtype. A row's answer does not depend on the rows beside it, down to the bits.
    """
    groups, page, dim = pages.k.shape[1:]
    x = qkv.view(len(qkv), heads + 2 * groups, dim)
    a, b = x[:, : heads + groups].float().chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)
    q, k, v = turned[:, :heads], turned[:, heads:], x[:, heads + groups :]
    if logn is not None:
        q = q * logn[:, None, None].to(q.dtype)
    y = torch.zeros(len(qkv), heads, dim, dtype=qkv.dtype, device=qkv.device)
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        at, slot = int(tables[row, position // page]), position % page
        for table, scales, new in ((pages.k, pages.k_scales, k[row]), (pages.v, pages.v_scales, v[row])):
            if scales is None:
                table[at, :, slot] = new
            else:
                codes, each = quantize_rows(new, dim)
                table[at, :, slot], scales[at, :, slot] = codes, each[:, 0]
        runs = [slice(int(p), int(p) + 1) for p in tables[row, : position // page + 1]]
        y[row] = causal_attention_pages(q[row : row + 1], pages, runs, position + 1)[0]
    flat = y.flatten(1)
    return flat if out is None else out.copy_(flat)
