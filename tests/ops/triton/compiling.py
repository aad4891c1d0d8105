"""Compiles every kernel for GPUs that aren't here, at the shapes of Qwen-1.8B: machine code needs no driver.

Launches are recorded instead of made: the host's functions run on meta tensors, and each launch goes to Triton's
compiler and NVIDIA's assembler, which come with Triton.
`python -m tests.ops.triton.compiling 90` prints one JSON line a kernel.
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

from qwenlet.ops.packing import Tiles
from qwenlet.ops.pages import CachePages
from qwenlet.ops.triton import linear
from qwenlet.ops.triton.attention import attend
from qwenlet.ops.triton.embedding import embed
from qwenlet.ops.triton.randomness import uniform
from qwenlet.ops.triton.sampling import SampleScratch, Settings, sample
from qwenlet.ops.triton.scratch import Scratch

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


def compile_launch(kernel: JITFunction, values: dict[str, Any], capability: int) -> triton.compiler.CompiledKernel:
    """As the launch would be compiled: by the arguments' types, whole numbers of 16 taken as such."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
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

        def said(*command: str | Path) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said(tools / "cuobjdump", "-res-usage")))
        code = said(tools / "nvdisasm", "-c")
    return Compiled(
        case, kernel.__name__, grid, int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]),
        compiled.metadata.shared, len(re.findall(r"LDG\S*\.128|LDGSTS\S*\.128", code)),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ cases


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _tiles(bits: int, group: int, rows: int, columns: int, kind: str = "symmetric", ordered: bool = False) -> Tiles:
    table = (-(-rows // 16), columns // group, 16)
    return Tiles(
        bits,
        group,
        rows,
        _empty(table[0], columns * bits // 32, 16, dtype=torch.int32),
        _empty(*table, dtype=torch.float16),
        _empty(*table, dtype=torch.uint8) if kind == "zeros" else None,
        _empty(*table, dtype=torch.float16) if kind == "minimums" else None,
        _empty(columns, dtype=torch.int32) if ordered else None,
    )


def _weight(form: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor | Tiles:
    if form == "floats":
        return _empty(rows, columns, dtype=dtype)
    bits, kind = (8, "symmetric") if form == "int8" else (4, form.partition(" ")[2] or "symmetric")
    return _tiles(bits, 32 if kind == "minimums" else 128, rows, columns, kind, ordered=kind == "zeros")


def products(form: str, rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """A layer's three kinds of products, in Qwen-1.8B's shapes; K = 5504 for the one with a residual."""
    scratch, norm = Scratch("meta"), _empty(2048, dtype=dtype)
    x, wide = _empty(rows, 2048, dtype=dtype), _empty(rows, 5504, dtype=dtype)
    linear.norm_linear(x, norm, 1e-6, _weight(form, 6144, 2048, dtype), _empty(6144, dtype=dtype), scratch=scratch)
    linear.linear_add(wide, _weight(form, 2048, 5504, dtype), x, scratch=scratch)
    up, gate = (_weight(form, 5504, 2048, dtype) for _ in range(2))
    linear.norm_swiglu(x, norm, 1e-6, up, gate, scratch=scratch)


def attention(groups: int, cache: torch.dtype, dtype: torch.dtype = torch.bfloat16) -> None:
    dim, heads, rows = 128, 16, 4
    shape = (40, groups, 64, dim)
    scales = [_empty(*shape[:3], dtype=torch.float32) for _ in range(2)] if cache == torch.int8 else [None, None]
    pages = CachePages(_empty(*shape, dtype=cache), _empty(*shape, dtype=cache), *scales)
    angles = [_empty(rows, dim // 2, dtype=torch.float32) for _ in range(2)]
    numbers = [_empty(rows, 128, dtype=torch.int32), _empty(rows, dtype=torch.int32)]
    qkv, logn = _empty(rows, (heads + 2 * groups) * dim, dtype=dtype), _empty(rows, dtype=torch.float32)
    attend(qkv, *angles, logn, pages, *numbers, heads=heads, scratch=Scratch("meta"))


def others(dtype: torch.dtype = torch.bfloat16) -> None:
    """What a step does outside its layers, and dequantizing."""
    ids = _empty(4, dtype=torch.int32)
    embed(ids, _empty(151936, 2048, dtype=dtype))
    embed(ids, _empty(151936, 2048, dtype=torch.int8), _empty(151936, 64, dtype=torch.float16), dtype=dtype)
    uniform(_empty(4, dtype=torch.int64), ids, ids)
    settings = Settings.greedy(4, 151936, "meta")
    sample(_empty(4, 151936, dtype=torch.float32), settings, SampleScratch(4, 151936, "meta"))
    for form in ("int4 zeros", "int8"):
        weight = _weight(form, 5504, 2048, dtype)
        assert isinstance(weight, Tiles)
        linear.dequantize(weight, dtype)


CASES: dict[str, Callable[[], None]] = {
    "one row, floats": lambda: products("floats", 1),
    "one row, int4": lambda: products("int4", 1),
    "one row, int4 with zeros and an order": lambda: products("int4 zeros", 1),
    "one row, int8": lambda: products("int8", 1),
    "16 rows, floats": lambda: products("floats", 16),
    "16 rows, int4": lambda: products("int4", 16),
    "64 rows, int4 with minimums": lambda: products("int4 minimums", 64),
    "attention": lambda: attention(16, torch.bfloat16),
    "attention over int8": lambda: attention(16, torch.int8),
    "attention of groups": lambda: attention(2, torch.bfloat16),
    "the rest": others,
}
# for a GPU without bfloat16
HALF: dict[str, Callable[[], None]] = {
    "one row, floats": lambda: products("floats", 1, torch.float16),
    "16 rows, int4": lambda: products("int4", 16, torch.float16),
    "attention over int8": lambda: attention(16, torch.int8, torch.float16),
    "fp32 rows": lambda: products("floats", 3, torch.float32),
}


def main(capability: int, chosen: str = "") -> None:
    for case, launch in (CASES if capability >= 80 else HALF).items():
        if chosen not in case:
            continue
        found: list[tuple[JITFunction, tuple[int, ...], dict[str, Any]]] = []
        with recorded(found):
            launch()
        for kernel, grid, values in found:
            compiled = compile_launch(kernel, values, capability)
            print(json.dumps(asdict(measured(case, kernel, grid, compiled))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
