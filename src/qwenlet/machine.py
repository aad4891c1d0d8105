"""What the system says of the machine. No torch."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path


def cpu_info(path: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """The processor's name and its flags, as far as the system tells."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.machine()
    return name, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def total_memory(path: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of memory; None where the system doesn't tell."""
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None


def peak_memory(path: Path = Path("/proc/self/status")) -> int | None:
    """Bytes of this process that were resident at the most so far; None where the system doesn't tell."""
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None


def gpu_memory(index: int = 0, command: str = "nvidia-smi") -> int | None:
    """Bytes that are free on a GPU, as its driver's tool tells; None without a tool, a driver or such a GPU."""
    query = [command, "--query-gpu=memory.free", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(told.split()[0]) * 1024**2
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def give_back_freed_blocks(size: int = 1 << 20) -> bool:
    """Has blocks of `size` bytes and more go back to the system once they are freed; whether that could be arranged.

    Left to itself, glibc keeps blocks of up to 32 MB in its heap after the first of them was freed. The logits of a
    prompt that is scored are of that size, and in a process that lives long the heap around them stays in pieces.
    """
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    try:
        return bool(ctypes.CDLL(None).mallopt(threshold, size))
    except (OSError, AttributeError, TypeError):  # another system, or another C library
        return False
