"""Causal attention of one row over its own keys, by torch's scaled-dot-product kernels.

Dimension letters: T new tokens, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwenlet.errors import ConfigError
from qwenlet.ops.pages import CachePages

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Restricts `causal_attention` to one of torch's kernels; "auto" leaves the choice to torch."""
    if name == "auto":
        yield
        return
    with sdpa_kernel(_BACKENDS[name]):
        yield


def check_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError if this machine can't run the kernel for this dtype."""
    if name == "auto":
        return
    probe = torch.zeros(2, 1, 64, device=device, dtype=dtype)
    try:
        with attention_backend(name):
            causal_attention(probe, probe, probe)
    except RuntimeError:
        works = "auto, flash, math" if device.type == "cpu" else "auto, math"
        raise ConfigError(
            f"torch has no {name!r} attention kernel for {dtype} on {device}", hint=f"these work here: {works}"
        ) from None


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where the last query sees the last key and each earlier one sees one key less.

    Args:
        q: [T, H, D]; k, v: [S, G, D] with S >= T and H a multiple of G, of one floating dtype.
    Returns:
        [T, H, D].
    """
    new, keys = q.shape[0], k.shape[0]
    return _sdpa(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], new, keys)[0].transpose(
        0, 1
    )


def causal_attention_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for B rows of one length without a past: q [B, T, H, D], k and v [B, T, G, D] -> [B, T, H, D]."""
    new = q.shape[1]
    return _sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), new, new).transpose(1, 2)


def causal_attention_pages(q: Tensor, pages: CachePages, runs: Sequence[slice], keys: int) -> Tensor:
    """The same over keys that lie in pages, plain or int8: q [T, H, D]; `runs` are the row's pages in order, as slices
    of neighbours, and the first `keys` of their keys count."""
    k = _gather(pages.k, pages.k_scales, runs, q.dtype)[:, :, :keys]
    v = _gather(pages.v, pages.v_scales, runs, q.dtype)[:, :, :keys]
    return _sdpa(q.transpose(0, 1)[None], k, v, q.shape[0], keys)[0].transpose(0, 1)


def _gather(pages: Tensor, scales: Tensor | None, runs: Sequence[slice], dtype: torch.dtype) -> Tensor:
    """[pages, G, page, D] -> [1, G, keys, D] in one copy. (`index_select` would copy the whole pool first.)"""

    def side_by_side(table: Tensor) -> Tensor:
        return torch.cat([table[run].transpose(0, 1) for run in runs], dim=1).flatten(1, 2)[None]

    found = side_by_side(pages)
    return found if scales is None else (found.float() * side_by_side(scales)[..., None]).to(dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, new: int, keys: int) -> Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]."""
    mask = None
    if 1 < new < keys:  # torch aligns is_causal to the first key, a continued row needs the last one
        mask = torch.ones(new, keys, dtype=torch.bool, device=q.device).tril(keys - new)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and new > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
