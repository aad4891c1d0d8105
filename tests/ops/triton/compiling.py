"""Compiles every kernel for GPUs that aren't here, at the shapes of Qwen-1.8B: no driver is needed up to the machine code.

Launches are recorded instead of made: the host's functions run on meta tensors, and each launch goes to Triton's compiler
and NVIDIA's assembler, which come with Triton. `python -m tests.ops.triton.compiling 90` prints one JSON line a kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Compiled:
    """What became of one launch: registers and spilled bytes of a thread, shared memory of a program, and how many of
    its loads from global memory take 16 bytes."""

    case: str
    kernel: str
    grid: tuple[int, ...]
    registers: int
    spilled: int
    shared: int
    wide_loads: int


@contextmanager
def recorded(found: list[tuple[JITFunction, tuple[int, ...], dict[str, Any]]]) -> Any:
    """Launches inside end up in `found` and nowhere else."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [p.name for p in self.params]
        found.append((self, tuple(grid), {**dict(zip(names, args, strict=False)), **named}))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = original


def compile_launch(
    kernel: JITFunction, values: dict[str, Any], capability: int
) -> triton.compiler.CompiledKernel:
    """As the launch would be compiled: by the arguments' types, whole numbers of 16 taken as such."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (value == 1 and isinstance(value, int)):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    options = {name: values[name] for name in _OPTIONS if name in values}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measured(case: str, kernel: JITFunction, grid: tuple[int, ...], compiled: Any) -> Compiled:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout))
    return Compiled(
        case, kernel.__name__, grid, int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]),
        compiled.metadata.shared, len(re.findall(r"LDG\S*\.128|LDGSTS\S*\.128", code.stdout)),
    )  # fmt: skip
