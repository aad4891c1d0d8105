"""Causal attention of one row over its own keys, by torch's scaled-dot-product kernels or the flash-attn package's.

    auto        the package's kernel on a GPU where it is installed, our own (training_attention.py) where a CPU trains,
                else torch's choice
    flash       the package's kernel, else torch's flash kernel
    sdpa        torch's choice
    efficient, math   torch's kernels of these names

Dimension letters: T new tokens, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

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


_asked: ContextVar[str] = ContextVar("attention", default="auto")


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Restricts `causal_attention` to the kernel of this name."""
    token = _asked.set(name)
    try:
        if name in _BACKENDS:
            with sdpa_kernel(_BACKENDS[name]):
                yield
        else:
            yield
    finally:
        _asked.reset(token)


def backend() -> str:
    """The kernel that was asked for here."""
    return _asked.get()


def check_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError if this machine can't run the kernel for this dtype."""
    if name not in _BACKENDS:
        return
    first, more = (torch.zeros(n, 1, 64, device=device, dtype=dtype) for n in (2, 4))
    try:
        with attention_backend(name):
            causal_attention(first, first, first)
            causal_attention(first, more, more)  # a row that goes on
    except RuntimeError:
        works = "auto, sdpa, flash, math" if device.type == "cpu" else "auto, sdpa, math"
        raise ConfigError(
            f"torch has no {name!r} attention kernel for {dtype} on {device}", hint=f"these work here: {works}"
        ) from None


@lru_cache(maxsize=1)
def flash_package() -> Any | None:
    """The flash-attn package's function, or None where it can't be imported."""
    try:
        from flash_attn import flash_attn_func
    except Exception:  # a package built for another torch fails in ways of its own
        return None
    return flash_attn_func


def _by_package(q: Tensor) -> bool:
    """Whether the flash-attn package answers q; it has kernels for sixteen bits and heads of up to 256."""
    if not q.is_cuda or backend() not in ("auto", "flash") or q.requires_grad:
        return False
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and flash_package() is not None


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
    if _by_package(q):
        package = flash_package()
        assert package is not None
        return package(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    mask: Any = None
    if 1 < new < keys:  # torch aligns is_causal to the first key, a continued row needs the last one
        # a GPU's flash kernel refuses any tensor as a mask, but knows this alignment
        mask = _flash_lower_right(new, keys) if q.is_cuda else _lower_right(new, keys, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and new > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def _flash_lower_right(new: int, keys: int) -> Any:
    from torch.nn.attention.bias import causal_lower_right  # a second's worth of torch._dynamo

    return causal_lower_right(new, keys)


def _lower_right(new: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(new, keys, dtype=torch.bool, device=device).tril(keys - new)
