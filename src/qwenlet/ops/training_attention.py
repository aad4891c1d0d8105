"""Causal attention of rows side by side, with its gradient, by kernels for a CPU: what training asks for.

torch's own kernel answers one row at a time, in products too small to be fast, and is left for everything else: other
devices and types, heads that are no multiple of sixteen, rows too few for the threads, and whoever asks for it by name.

Dimension letters: N tokens of all rows, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qwenlet.ops import cpu
from qwenlet.ops.attention import backend

_LANES = 16
_TYPES = (torch.bfloat16, torch.float32)


def takes(q: Tensor, k: Tensor, lengths: Sequence[int]) -> bool:
    """Whether the kernels take these rows, and have work for every thread."""
    if q.device.type != "cpu" or q.dtype not in _TYPES or q.shape[-1] % _LANES:
        return False
    if cpu.status().isa in (None, "portable") or backend() != "auto":  # plain C++ takes six times as long as torch
        return False
    longest, total = max(lengths), sum(lengths)
    # a row and a head of keys are one thread's work, whose cost grows with the row's square
    return total * k.shape[1] >= longest * torch.get_num_threads()


def attend_rows(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where a token sees those of its own row up to itself; sums in float32.

    Args:
        q: [N, H, D]; k, v: [N, G, D], H a multiple of G, of one dtype, bfloat16 or float32; D a multiple of 16.
        lengths: of the rows, one after another; they sum to N.
    Returns:
        [N, H, D], contiguous.
    """
    result: Tensor = _Attention.apply(q, k, v, lengths)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        q, k, v = map(_by_token, (q, k, v))
        ctx.spans = _spans(lengths)
        out = q.new_empty(q.shape)
        sums = torch.empty(q.shape[1], q.shape[0])
        _run(ctx.spans, q, k, v, out, sums)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        of_q, of_k, of_v = (x.new_empty(x.shape) for x in (q, k, v))
        _run(ctx.spans, q, k, v, out, sums, (grads[0].contiguous(), of_q, of_k, of_v))
        return of_q, of_k, of_v, None


def _by_token(x: Tensor) -> Tensor:
    """A token's numbers side by side, as they are where q, k and v are pieces of one product."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _spans(lengths: Sequence[int]) -> Tensor:
    """First token and length [rows, 2] of each row, the longest first, so that no thread ends with one."""
    starts = accumulate(lengths, initial=0)
    spans = sorted((span for span in zip(starts, lengths, strict=False) if span[1]), key=lambda span: -span[1])
    return torch.tensor(spans, dtype=torch.int64)


def _run(
    spans: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, back: Sequence[Tensor] | None = None
) -> None:
    tokens, heads, dim = q.shape
    assert q.dtype == k.dtype == v.dtype, f"{q.dtype}, {k.dtype} and {v.dtype}, expected one"
    sizes = (len(spans), spans.data_ptr(), q.itemsize * 8, tokens, heads, k.shape[1], dim)
    strides = (q.stride(0), k.stride(0), v.stride(0))
    addresses = [x.data_ptr() for x in (q, k, v, out, sums, *(back or ()))] + [0] * (0 if back else 4)
    cpu.kernels().train_attention(
        cpu.status().isa, torch.get_num_threads(), back is not None, *sizes, *strides, *addresses
    )
