"""What the system says of the machine, and what is made of it where it says nothing."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qwenlet.machine import cpu_info, gpu_memory, peak_memory, total_memory


def test_a_processor_has_a_name_and_flags(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: Some Processor\nflags\t\t: fpu avx2 avx512_vnni\n\n")
    assert cpu_info(told) == ("Some Processor", frozenset({"fpu", "avx2", "avx512_vnni"}))
    _, flags = cpu_info(tmp_path / "missing")
    assert flags == frozenset()


def test_memory_is_read_where_the_system_tells_it(tmp_path):
    told = tmp_path / "told"
    told.write_text("MemTotal:       2048 kB\nVmHWM:\t    1024 kB\n")
    assert total_memory(told) == 2048 * 1024
    assert peak_memory(told) == 1024 * 1024
    told.write_text("MemTotal: much\nVmHWM: much\n")
    assert total_memory(told) is None
    assert peak_memory(told) is None
    assert total_memory(tmp_path / "missing") is None


def tool(folder: Path, answer: str) -> str:
    """A driver's tool that answers any question alike."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


def test_a_gpu_tells_what_is_free_on_it(tmp_path):
    command = tool(tmp_path, 'for last; do :; done; [ "$last" = --id=1 ] && echo 40960 || exit 6')
    assert gpu_memory(1, command) == 40 * 1024**3
    assert gpu_memory(0, command) is None  # there is no such GPU


def test_without_a_driver_nothing_is_known_of_a_gpu(tmp_path):
    assert gpu_memory(0, str(tmp_path / "missing")) is None
    assert gpu_memory(0, tool(tmp_path, "echo '[N/A]'")) is None
    assert gpu_memory(0, tool(tmp_path, "true")) is None


HELD_BLOCKS = """
import ctypes, sys
from qwenlet.machine import give_back_freed_blocks


class Held(ctypes.Structure):  # mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


library = ctypes.CDLL(None)
library.mallinfo2.restype = Held
if "asked" in sys.argv:
    assert give_back_freed_blocks()
block = bytearray(30 << 20)
del block
before = library.mallinfo2().hblkhd
block = bytearray(10 << 20)
print((library.mallinfo2().hblkhd - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps them")
def test_a_large_block_is_a_mapping_of_its_own_where_it_was_asked_for():
    def mapped(*arguments: str) -> int:
        command = [sys.executable, "-c", HELD_BLOCKS, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert mapped("asked") == 10
    assert mapped() == 0  # else this test shows nothing
