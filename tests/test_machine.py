"""What the system says of the machine, and what is made of it where it says nothing."""

from __future__ import annotations

from pathlib import Path

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
