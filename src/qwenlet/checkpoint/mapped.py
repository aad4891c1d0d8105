"""Bytes of a file as a tensor, mapped: read when they are looked at, and no longer ours when the tensor is gone."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def mapped_bytes(path: Path, offset: int, size: int) -> Tensor:
    """[size] uint8, of the file from `offset` on; writing to it doesn't reach the file.

    Raises:
        OSError: the file can't be mapped.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    try:
        # a mapping per tensor, and no open file behind it
        whole = torch.from_file(str(path), shared=False, size=offset + size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(f"{path} can't be mapped: {str(error).splitlines()[0]}") from None
    return whole[offset:]


@lru_cache(maxsize=1)
def _madvise() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def let_go(mapped: Tensor) -> None:
    """Stops counting a mapped tensor's pages as ours; what is looked at next is mapped again, from the file's cache.

    Around a page that is looked at the system maps fifteen more, so a few thousand rows of an embedding can make most
    of it count. Nothing may have been written to the tensor: it would be lost.
    """
    call = _madvise()
    if call is None:
        return
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    # the span in memory: a strided view holds other columns between its own
    end = (
        mapped.data_ptr()
        + sum((n - 1) * s for n, s in zip(mapped.shape, mapped.stride(), strict=True)) * mapped.itemsize
    )
    if end > start:
        call(start, end // mmap.PAGESIZE * mmap.PAGESIZE - start, mmap.MADV_DONTNEED)
