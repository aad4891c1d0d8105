"""Kernels for a GPU, in Triton: the same nouns as ops/cpu. Importing this loads neither torch nor triton.

    linear.py      norm_linear, linear_add, norm_swiglu for the few rows of a decode step; linear for any number of rows
    attention.py   attend: rotation, storing and attention over pages of one step, in one launch
    sampling.py    sample: logits to tokens on the device, with the definition of qwenlet.sampling
    randomness.py  uniform: the numbers it draws with, from seed, choice and position
    embedding.py   embed: rows of the table
    scratch.py     Scratch: memory in which the programs of a launch hand each other partial sums

Kernels are in these files too, but for products: one_row.py, few_rows.py and unpack.py over codes.py.

A layer of a decode step is five launches, whatever the precision and the number of rows:

    1  norm_linear   RMSNorm -> query-key-value product + bias
    2  attend        rotation, log-n, key and value into their page, attention by splits of the past, their reduction
    3  linear_add    output product + residual
    4  norm_swiglu   RMSNorm -> both products -> up * silu(gate)
    5  linear_add    down product + residual

Nothing here waits for the device, and no launch's shape depends on numbers in device memory, so a step can be captured
in a CUDA graph. Quantized weights lie in `packing.Tiles`, as on a CPU: one file, one order, no repacking.

`TRITON_INTERPRET=1` runs all of it on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

ROWS = 64  # most rows of a decode step's launches


@dataclass(frozen=True)
class Status:
    """Whether these kernels run here, and why (not)."""

    runs: bool
    reason: str


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def status() -> Status:
    """Whether these kernels run here: triton is there, and a CUDA device or the interpreter."""
    if importlib.util.find_spec("triton") is None:
        return Status(False, "triton is not installed; pip install 'qwenlet[gpu]'")
    if interpreted():
        return Status(True, "TRITON_INTERPRET=1: on the CPU, for tests")
    import torch

    if not torch.cuda.is_available():
        return Status(False, "torch sees no CUDA device")
    return Status(True, f"Triton on {torch.cuda.get_device_name()}")
