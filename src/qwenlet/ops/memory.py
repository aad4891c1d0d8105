"""Memory in large pages: a processor finds its way through 4 kB pages more slowly than it reads them."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

LARGE_PAGE = 1 << 21


def large_pages(size: int) -> Tensor:
    """[size] uint8, from the beginning of a page of 2 MB on where the system has these. In memory once written."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < LARGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)
    # shared memory has pages of its own
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: smaller pages hold as much
        memory.madvise(advice)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % LARGE_PAGE
    return whole[begin : begin + size]
