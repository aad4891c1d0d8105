"""The machine in words."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from qwenlet.machine import cpu_info, total_memory
from qwenlet.ops import cpu
from qwenlet.profiling.records import Machine


def describe(device: torch.device) -> Machine:
    """What stands at the head of a report."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    software = {"Python": platform.python_version(), "torch": str(torch.__version__)}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        software |= {"CUDA": str(torch.version.cuda)}
        kernels = "torch"
        with suppress(PackageNotFoundError):
            software["Triton"] = version("triton")
            kernels = "Triton, torch"
        return Machine("cuda", gpu.name, kernels, usable, torch.get_num_threads(), gpu.total_memory, software)
    name, _ = cpu_info()
    kernels = cpu.status().isa or "torch"
    return Machine("cpu", name, kernels, usable, torch.get_num_threads(), total_memory(), software)
