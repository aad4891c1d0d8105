"""Cross-entropy of the next token, a few rows at a time: the logits of a batch never stand in memory whole.

A row of Qwen's logits is 151,936 numbers: 2,048 rows of them in float32 are 1.2 GB, and their gradient as much again.
Where the head is a plain weight, the gradient of a few rows is made right behind their logits, so that backward has
nothing left to do but to scale it: no product is computed twice. Any other head (one with an adapter, or in codes) is
computed again in backward.

Dimension letters: R rows that are counted, C hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24  # of float32 logits at once: 64 MB
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
        return x.float().sum() * 0.0  # keeps every parameter in the graph
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.bias is None:
        return _HeadLoss.apply(x, head.weight, targets, chunk_elements)
    return token_losses(head, x, targets, chunk_elements=chunk_elements).sum()


def token_losses(head: nn.Module, x: Tensor, targets: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """The cross-entropy of each: x [R, C], targets [R], none of them IGNORED -> [R] float32; any head."""
    rows = max(1, chunk_elements // int(head.out_features))  # type: ignore[arg-type]
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
    """Sum of cross-entropies of x W^T, with its gradients made on the way: x [R, C], W [V, C], targets [R]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_elements: int) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rows = max(1, chunk_elements // weight.shape[0])
        total = torch.zeros((), device=x.device)
        dx = torch.empty(x.shape, dtype=dtype, device=x.device) if of_x else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if of_weight else None
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            for start in range(0, len(targets), rows):
                part, wanted = x[start : start + rows].to(dtype), targets[start : start + rows]
                logp = F.log_softmax((part @ w.t()).float(), dim=-1)
                at = wanted[:, None]
                total -= logp.gather(1, at).sum()
                if dx is None and dw is None:
                    continue
                d = logp.exp_()  # of the logits: what was likely, less what was right
                d.scatter_add_(1, at, d.new_full((1, 1), -1.0).expand(len(wanted), 1))
                d = d.to(dtype)
                if dx is not None:
                    torch.mm(d, w, out=dx[start : start + rows])
                if dw is not None:
                    dw += d.t() @ part
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
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
        )
