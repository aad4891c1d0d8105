"""Cross-entropy of the next token, some rows at a time: the logits of a batch never stand in memory whole.

A row of Qwen's logits is 151,936 numbers: 2,048 rows of them in float32 are 1.2 GB, and their gradient as much again.
Where the head is a plain weight, or one in codes, the gradient of some rows is made right behind their logits, in
their place, so that backward has nothing left to do but to scale it: no product is computed twice. Any other head (one
with an adapter) is computed again in backward.

Dimension letters: R rows that are counted, C hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwenlet.linear import QuantLinear, TiledLinear, compute_dtype, product, tiles_back
from qwenlet.model import Linear
from qwenlet.ops.packing import Tiles

# Logits at once, in the dtype they are computed in: 256 rows of Qwen's in bfloat16, for which a product reads the head
# once. 84 MB, or 168 in float32.
CHUNK_ELEMENTS = 42_000_000
# Of these, in float32 at once: few enough to stay near the processor's caches.
_PIECE_ELEMENTS = 1 << 20
_KERNEL_ROWS = 32  # of a head in tiles at once
IGNORED = -100


def head_loss(head: nn.Module, x: Tensor, targets: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Sum of the cross-entropies, float32.

    Args:
        head: hidden states -> logits.
        x: [N, C] hidden states; targets: [N] int64, the id that each foretells, IGNORED: not counted.
    """
    counted = targets != IGNORED
    if not bool(counted.all()):
        x, targets = x[counted], targets[counted]
    if not len(targets):
        learning = [p.float().sum() for p in head.parameters() if p.requires_grad]
        return sum(learning, x.float().sum()) * 0.0  # keeps every parameter in the graph, the head's too
    if type(head) in (nn.Linear, Linear) and head.bias is None:
        return _HeadLoss.apply(x, head.weight, None, targets, chunk_elements)
    if isinstance(head, QuantLinear | TiledLinear) and head.bias is None:
        # half as many: codes unpack as quickly for 128 rows, and here a step's memory is at its most
        return _HeadLoss.apply(x, None, head.tiles, targets, chunk_elements // 2)
    return token_losses(head, x, targets, chunk_elements=chunk_elements).sum()


def token_losses(head: nn.Module, x: Tensor, targets: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """The cross-entropy of each: x [R, C], targets [R], none of them IGNORED -> [R] float32; any head."""
    rows = max(1, chunk_elements // 2 // int(head.out_features))  # type: ignore[arg-type]
    parts = []
    for part, wanted in zip(x.split(rows), targets.split(rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_losses, head, part, wanted, use_reentrant=False))
        else:
            parts.append(_losses(head, part, wanted))
    return torch.cat(parts)


def _losses(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).float(), targets, reduction="none")


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of x W^T, with its gradients made on the way: x [R, C], W [V, C] or tiles, targets [R]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, tiles: Tiles | None, targets: Tensor, chunk_elements: int
    ) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            w = None if weight is None else weight.to(dtype)
            vocabulary = len(w) if w is not None else tiles.rows  # type: ignore[union-attr]
            rows = max(1, chunk_elements // vocabulary)
            total = torch.zeros((), device=x.device)
            dx = torch.empty(x.shape, dtype=dtype, device=x.device) if of_x else None
            dw = torch.zeros(vocabulary, x.shape[1], device=x.device) if of_weight else None
            for start in range(0, len(targets), rows):
                part, wanted = x[start : start + rows].to(dtype), targets[start : start + rows]
                logits = part @ w.t() if w is not None else _logits(part, tiles)
                total += _into_gradient(logits, wanted)
                if dx is not None and w is not None:
                    torch.mm(logits, w, out=dx[start : start + rows])
                elif dx is not None and tiles is not None:
                    dx[start : start + rows] = tiles_back(logits, tiles)
                if dw is not None:
                    dw += logits.t() @ part
        ctx.save_for_backward(dx, None if dw is None or weight is None else dw.to(weight.dtype))
        ctx.dtype = x.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if dx is None else (dx.float() * scale).to(ctx.dtype),
            None if dw is None else dw * scale.to(dw.dtype),
            None,
            None,
            None,
        )


def _logits(x: Tensor, tiles: Tiles | None) -> Tensor:
    """x W^T in x's dtype; the kernels' float32 results stand in memory for some rows at a time."""
    assert tiles is not None, "a head has a weight or tiles"
    logits = x.new_empty(len(x), tiles.rows)
    for part, to in zip(x.split(_KERNEL_ROWS), logits.split(_KERNEL_ROWS), strict=True):
        to.copy_(product(part, tiles, None))
    return logits


def _into_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of logits [R, V], which become its gradient: what was likely, less what was right."""
    total = torch.zeros((), device=logits.device)
    rows = max(1, (_PIECE_ELEMENTS if logits.device.type == "cpu" else logits.numel()) // logits.shape[1])
    for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        logp, at = F.log_softmax(part.float(), dim=-1), wanted[:, None]
        total -= logp.gather(1, at).sum()
        d = logp.exp_()
        d.scatter_add_(1, at, d.new_full((1, 1), -1.0).expand(len(wanted), 1))
        part.copy_(d)
    return total
