"""Bytes of a file as a tensor, mapped: read when they are looked at, and no longer ours when the tensor is gone.

Of a table few of whose rows are wanted, these alone are read (`FileRows`).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Sequence
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


def by_rows(mapped: Tensor) -> Tensor:
    """The tensor itself, of whose pages few will be looked at: a file that the system keeps in pieces of 2 MB is else
    mapped piece by piece, and a few hundred rows of an embedding make all of it count as ours."""
    call, advice = _madvise(), getattr(mmap, "MADV_NOHUGEPAGE", None)
    if call is None or advice is None:
        return mapped
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    # the span in memory: a strided view holds other columns between its own
    end = (
        mapped.data_ptr()
        + sum((n - 1) * s for n, s in zip(mapped.shape, mapped.stride(), strict=True)) * mapped.itemsize
    )
    if end > start:
        call(start, end // mmap.PAGESIZE * mmap.PAGESIZE - start, advice)
    return mapped


class FileRows:
    """Rows of a table in a file, read when they are asked for.

    A look at a mapped row maps what the system keeps around it in one piece, which may be 2 MB: after some hundred rows
    all of an embedding counts as ours. Read, they are no more than they are.

    Args:
        offset: of the table in the file, in bytes; shape: [V, ...], its rows one after the other.
    Raises:
        OSError: the file can't be opened, or (on reading) ends early.
    """

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._path, self._offset, self._dtype = path, offset, dtype
        self._rows, self._shape = shape[0], tuple(shape[1:])
        self._width = math.prod(self._shape) * dtype.itemsize
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._file)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [N] int64 from 0 to V - 1 -> [N, ...]."""
        wanted = ids.tolist()
        if not wanted:
            return torch.empty(0, *self._shape, dtype=self._dtype)
        held = bytearray(len(wanted) * self._width)
        room = memoryview(held)
        for place, id in enumerate(wanted):
            if not 0 <= id < self._rows:
                raise IndexError(f"row {id} of a table of {self._rows}")
            begin = self._offset + id * self._width
            some = room[place * self._width : (place + 1) * self._width]
            if os.preadv(self._file, [some], begin) != self._width:
                raise OSError(f"{self._path} ends before byte {begin + self._width:,}, though it had row {id} before")
        return torch.frombuffer(held, dtype=self._dtype).view(len(wanted), *self._shape)


def file_rows(*tables: tuple[Path, int, Sequence[int], torch.dtype]) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
    """What reads the same rows of several tables; None where the system can't read at a place (Windows)."""
    if not hasattr(os, "preadv"):
        return None
    found = [FileRows(*table) for table in tables]
    return lambda ids: tuple(rows(ids) for rows in found)
