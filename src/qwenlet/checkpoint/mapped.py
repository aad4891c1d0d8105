"""Bytes of a file as a tensor, mapped: read when they are looked at, and no longer ours when the tensor is gone.

Or copied into pages of 2 MB where the system gives them: a processor finds its way through 4 kB pages of a mapping more
slowly than it reads them (int4 rows by AVX-512 on a Xeon: 25 GB/s mapped, 30 copied).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qwenlet.ops.memory import large_pages
from qwenlet.plan import available_memory


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


_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LEAST = 1 << 25  # bytes from which a copy is worth its time
_PIECE = 1 << 25  # bytes a thread reads at once


def copied_bytes(
    path: Path, offset: int, size: int, spare: int = 1 << 30, setting: Path = _LARGE_PAGES
) -> Tensor | None:
    """[size] uint8, of the file from `offset` on, in large pages of memory; None where mapping is the better way.

    That is for little, where the system has no such pages (elsewhere than on Linux, or switched off), or where less
    than `spare` bytes would be left: mapped pages can be taken back, these can't.

    Raises:
        OSError: the file can't be read, or is shorter.
    """
    try:
        offered = "[never]" not in setting.read_text(encoding="ascii")
    except OSError:
        return None
    free = available_memory()
    if size < _LEAST or not offered or free is None or free < size + spare:
        return None
    memory = large_pages(size)
    whole = memoryview(memory.numpy().data)

    def read(begin: int) -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset + begin)
            end = min(size, begin + _PIECE)
            while begin < end:
                count = file.readinto(whole[begin:end])
                if not count:
                    raise OSError(f"{path} ends after {offset + begin:,} bytes, expected {offset + size:,}")
                begin += count

    with ThreadPoolExecutor(torch.get_num_threads()) as readers:
        list(readers.map(read, range(0, size, _PIECE)))
    return memory


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
    _advise(mapped, "MADV_NOHUGEPAGE")
    return mapped


def let_go(*mapped: Tensor) -> None:
    """Stops counting mapped tensors' pages as ours; what is looked at next is mapped again, from the file's cache.

    Around a page that is looked at the system maps fifteen more, so a few thousand rows of an embedding can make most
    of it count. Nothing may have been written to the tensors: it would be lost.
    """
    for tensor in mapped:
        _advise(tensor, "MADV_DONTNEED")


def _advise(mapped: Tensor, advice: str) -> None:
    """Tells Linux of the pages that lie in the tensor whole."""
    call, number = _madvise(), getattr(mmap, advice, None)
    if call is None or number is None:
        return
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    # the span in memory: a strided view holds other columns between its own
    end = (
        mapped.data_ptr()
        + sum((n - 1) * s for n, s in zip(mapped.shape, mapped.stride(), strict=True)) * mapped.itemsize
    )
    if end > start:
        call(start, end // mmap.PAGESIZE * mmap.PAGESIZE - start, number)
