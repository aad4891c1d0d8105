"""What the system says of the machine. No torch."""

from __future__ import annotations

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
