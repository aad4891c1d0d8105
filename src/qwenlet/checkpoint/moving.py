"""Bytes of a file that are there at once, mapped, and move into pages of 2 MB while they are in use.

A processor finds its way through 4 kB pages of a mapping more slowly than it reads them (int4 rows by AVX-512 on a
Xeon: 25 GB/s mapped, 30 in large pages). To copy them first would hold up a start, by a second and more where a virtual
machine's host is slow to give memory. So a thread copies piece by piece, and puts each copy where its piece was
(`mremap`): addresses stay, and whoever reads meanwhile finds the same bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from qwenlet.checkpoint.mapped import mapped_bytes
from qwenlet.ops.memory import LARGE_PAGE
from qwenlet.plan import available_memory

_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LEAST = 1 << 25  # bytes from which a copy is worth its time
_PIECE = 1 << 24  # bytes that are there twice for a moment; whole large pages
THREAD = "qwenlet-moving"
_left: dict[object, int] = {}  # bytes that each mover has yet to move
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_left.clear)  # threads stay with the parent


def moving_bytes(path: Path, offset: int, size: int, spare: int = 1 << 30, setting: Path = _LARGE_PAGES) -> Tensor:
    """[size] uint8, of the file from `offset` on, mapped, and soon in large pages of memory. Not to be written to.

    They stay mapped where that is the better way: if it is little, if the system has no such pages (elsewhere than on
    Linux, or switched off), or if less than `spare` bytes would be left: mapped pages can be taken back, these can't.

    Raises:
        OSError: the file can't be read or mapped, or is shorter.
    """
    system = _system()
    if system is None or not _worthwhile(size, spare, setting):
        return mapped_bytes(path, offset, size)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if os.fstat(file).st_size < offset + size:
            raise OSError("the file is shorter")
        held = _map(system, file, first, offset + size - first)
    except OSError:
        os.close(file)
        return mapped_bytes(path, offset, size)  # says what is wrong, or needs less
    whole, mover = torch.frombuffer(held, dtype=torch.uint8), object()
    _left[mover] = len(held)
    work = (system, weakref.ref(held), mover, file, first)
    try:
        Thread(target=_move, args=work, name=THREAD, daemon=True).start()
    except RuntimeError:  # no more threads: it stays mapped
        del _left[mover]
        os.close(file)
    return whole[offset - first :]


def memory_to_come() -> int:
    """Bytes of memory that moving takes yet, though they count as free."""
    return sum(list(_left.values()))


def _worthwhile(size: int, spare: int, setting: Path) -> bool:
    try:
        offered = "[never]" not in setting.read_text(encoding="ascii")
    except OSError:
        return False
    free = available_memory()
    return size >= _LEAST and offered and free is not None and free - memory_to_come() >= size + spare


class _System:
    """Calls of the system that Python's `mmap` doesn't make: to map at an address, and to move what is mapped."""

    _FIXED, _MAY_MOVE, _MOVE_TO = 0x10, 1, 2

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._mmap, self._mremap, self._munmap = library.mmap, library.mremap, library.munmap
        self._mmap.argtypes = (pointer, size, number, number, number, ctypes.c_long)
        self._mremap.argtypes = (pointer, size, size, number, pointer)
        self._munmap.argtypes = (pointer, size)
        self._madvise = library.madvise
        self._madvise.argtypes = (pointer, size, number)
        self._mmap.restype = self._mremap.restype = pointer

    def reserve(self, size: int) -> int:
        """Addresses without memory."""
        return self._there(self._mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0))

    def map_file(self, at: int, size: int, file: int, first: int) -> None:
        access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | self._FIXED
        self._there(self._mmap(at, size, access, flags, file, first))

    def large_pages(self, size: int) -> int:
        """Memory from the beginning of a large page on, once it is written."""
        access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        room = self._there(self._mmap(None, size + LARGE_PAGE, access, flags, -1, 0))
        at = -(-room // LARGE_PAGE) * LARGE_PAGE
        if at > room:
            self.unmap(room, at - room)
        self.unmap(at + size, room + LARGE_PAGE - at)
        self._madvise(at, size, mmap.MADV_HUGEPAGE)  # smaller pages hold as much
        return at

    def move(self, at: int, size: int, to: int) -> None:
        """What is mapped in [at, at + size) takes the place of what is mapped from `to` on, in one step for readers."""
        self._there(self._mremap(at, size, size, self._MAY_MOVE | self._MOVE_TO, to))

    def unmap(self, at: int, size: int) -> None:
        self._munmap(at, size)

    def _there(self, address: int | None) -> int:
        if address is None or address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, f"memory can't be mapped: {os.strerror(number)}")
        return address


@lru_cache(maxsize=1)
def _system() -> _System | None:
    known = sys.platform.startswith("linux") and sys.maxsize > 1 << 32 and hasattr(mmap, "MADV_HUGEPAGE")
    return _System() if known else None


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _map(system: _System, file: int, first: int, size: int) -> ctypes.Array[ctypes.c_uint8]:
    """The file from `first` on, mapped from the beginning of a large page on, until the array is gone."""
    whole = _pages(size) + LARGE_PAGE
    room = system.reserve(whole)
    at = -(-room // LARGE_PAGE) * LARGE_PAGE
    try:
        system.map_file(at, size, file, first)
    except OSError:
        system.unmap(room, whole)
        raise
    held = (ctypes.c_uint8 * size).from_address(at)
    # not at the end of the program: other threads may still read
    weakref.finalize(held, system.unmap, room, whole).atexit = False
    return held


def _move(
    system: _System, mapped: weakref.ref[ctypes.Array[ctypes.c_uint8]], mover: object, file: int, first: int
) -> None:
    """Piece by piece, as long as somebody holds what is mapped, and there is memory; what is left stays mapped."""
    begin = 0
    try:
        with suppress(OSError):
            while (held := mapped()) is not None and begin < len(held):
                _left[mover] = len(held) - begin
                _move_piece(system, ctypes.addressof(held), begin, min(_PIECE, len(held) - begin), file, first)
                begin += _PIECE
                del held
    finally:
        _left.pop(mover, None)
        os.close(file)


def _move_piece(system: _System, at: int, begin: int, size: int, file: int, first: int) -> None:
    copy = system.large_pages(_pages(size))
    try:
        room, done = memoryview((ctypes.c_uint8 * size).from_address(copy)), 0
        while done < size:
            count = os.preadv(file, [room[done:]], first + begin + done)
            if not count:
                raise OSError("the file became shorter")
            done += count
    except OSError:
        system.unmap(copy, _pages(size))
        raise
    try:
        system.move(copy, _pages(size), at + begin)
    except OSError:
        system.map_file(at + begin, size, file, first + begin)  # what was there may be gone already
        system.unmap(copy, _pages(size))
        raise
