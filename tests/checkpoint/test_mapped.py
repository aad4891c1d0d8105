"""Bytes of a file as tensors: mapped, or read row by row."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwenlet.checkpoint import mapped


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(torch.arange(100_000, dtype=torch.int32).numpy().tobytes())
    return path


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what a mapping was told stands there on Linux only")
def test_of_a_table_that_is_read_by_rows_the_system_maps_no_large_pieces(file):
    table = mapped.mapped_bytes(file, 0, 400_000).view(1000, 400)
    before = table.clone()
    assert mapped.by_rows(table) is table
    flags = next(flags for begin, end, flags in _mappings() if begin <= table.data_ptr() + mmap.PAGESIZE < end)
    assert "nh" in flags
    assert torch.equal(table, before)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reading at a place is missing on Windows")
def test_rows_are_read_and_not_mapped(file):
    rows = mapped.file_rows((file, 404, (1000, 5, 3), torch.float16), (file, 0, (50, 2), torch.int32))
    assert rows is not None
    ids = torch.tensor([3, 49, 3, 0])
    halves, numbers = rows(ids)
    table = mapped.mapped_bytes(file, 404, 30_000).view(torch.float16).view(1000, 5, 3)
    assert torch.equal(halves.view(torch.int16), table[ids].view(torch.int16))
    assert numbers.tolist() == [[6, 7], [98, 99], [6, 7], [0, 1]]
    assert [len(part) for part in rows(ids[:0])] == [0, 0]
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match=f"row {wrong} of a table of"):
            rows(torch.tensor([wrong]))


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reading at a place is missing on Windows")
def test_a_file_that_became_shorter_is_an_error_and_no_crash(file):
    rows = mapped.FileRows(file, 0, (1000, 100), torch.int32)
    os.truncate(file, 1000)
    rows(torch.tensor([0, 1]))
    with pytest.raises(OSError, match="ends before byte 1,200"):
        rows(torch.tensor([2]))


def _mappings() -> Iterator[tuple[int, int, list[str]]]:
    span = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = first.split("-")
            span = (int(begin, 16), int(end, 16))
        elif first == "VmFlags:":
            yield *span, rest.split()
