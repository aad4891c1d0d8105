"""How fast this machine reads memory and multiplies, with nothing of the model in it: the best of several ways.

On a CPU memory is read in pages of 2 MB, in which the weights lie, too: in pages of 4 kB a processor is busier finding
its way than reading, and operators would reach more than everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwenlet.ops.memory import large_pages
from qwenlet.profiling.records import Ceilings

_ROUNDS = 7
_CPU_BYTES, _GPU_BYTES = 1 << 30, 1 << 32  # far more than any cache holds
_CPU_SIDE, _GPU_SIDE = 2048, 8192  # of square matrices
_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure_ceilings(device: torch.device, *, size: int | None = None, side: int | None = None) -> Ceilings:
    """A few seconds of reading and multiplying.

    Args:
        size: bytes to read; side: of the matrices. None: what is large enough for the device.
    """
    gpu = device.type == "cuda"
    speed, how = read_speed(device, size or (_GPU_BYTES if gpu else _CPU_BYTES))
    side = side or (_GPU_SIDE if gpu else _CPU_SIDE)
    operations: dict[str, float] = {}
    ways = {"read": how}
    for name, way, multiply in _products(device, side):
        if not _runs(multiply):
            continue
        reached = 2.0 * side**3 / best_seconds(multiply, device)
        if reached > operations.get(name, 0.0):
            operations[name], ways[name] = reached, f"{way}, {side} x {side} x {side}"
    return Ceilings(speed, operations, ways)


def best_seconds(work: Callable[[], object], device: torch.device, rounds: int = _ROUNDS) -> float:
    """The shortest of several runs after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(rounds):
        finish(device)
        start = time.perf_counter()
        work()
        finish(device)
        best = min(best, time.perf_counter() - start)
    return best


def finish(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Reader:
    """A way to read memory.

    Attributes:
        speed: bytes/s, the best of several times.
        size: bytes moved at a time.
    """

    how: str
    speed: float
    size: int
    read: Callable[[], object]

    def now(self) -> float:
        """Bytes/s of one time."""
        start = time.perf_counter()
        self.read()
        return self.size / (time.perf_counter() - start)


def fastest_reader(device: torch.device, size: int = _CPU_BYTES) -> Reader:
    """The fastest of several ways to read `size` bytes, which it keeps."""
    data = _memory(device, size)
    found = [Reader(how, moved / best_seconds(read, device), moved, read) for how, moved, read in _readers(data)]
    return max(found, key=lambda reader: reader.speed)


def read_speed(device: torch.device, size: int = _CPU_BYTES) -> tuple[float, str]:
    """Bytes/s, and how they were read."""
    reader = fastest_reader(device, size)
    return reader.speed, reader.how


def _memory(device: torch.device, size: int) -> Tensor:
    """[size / 4] float32 ones, on a CPU in large pages."""
    if device.type != "cpu":
        return torch.ones(size // 4, device=device)
    return large_pages(size // 4 * 4).view(torch.float32).fill_(1.0)


def _readers(data: Tensor) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(how, bytes moved, the work)."""
    where = "in pages of 2 MB" if data.device.type == "cpu" else "of GPU memory"
    yield f"sum {where}", data.nbytes, data.sum
    yield f"largest {where}", data.nbytes, data.view(torch.int32).amax
    yield f"dot product with itself {where}", data.nbytes, lambda: torch.dot(data, data)
    if data.device.type == "cpu":
        return
    half = len(data) // 2
    target, source = data[:half], data[half : 2 * half]
    yield "copy of GPU memory, both ways counted", 2 * source.nbytes, lambda: target.copy_(source)


def _products(device: torch.device, side: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(type, how, the work) of square products, some of which this torch may not have here."""

    def square(dtype: torch.dtype) -> Tensor:
        return torch.ones(side, side, device=device, dtype=dtype)

    for name, dtype in _FLOATS.items():
        yield name, "torch.matmul", partial(torch.matmul, square(dtype), square(dtype).T)
    a, b = square(torch.int8), square(torch.int8)
    yield "int8", "torch._int_mm by rows", partial(torch._int_mm, a, b)
    yield "int8", "torch._int_mm by columns", partial(torch._int_mm, a, b.T)
    if device.type == "cpu":
        yield "int8", "oneDNN's int8 linear", _onednn_linear(a.view(torch.uint8), b)


def _onednn_linear(x: Tensor, weight: Tensor) -> Callable[[], object]:
    """x [N, N] uint8 by weight [N, N] int8 in oneDNN's own order, which is packed at the first call."""
    packed: list[Tensor] = []
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)

    def multiply() -> object:
        if not packed:
            packed.append(torch.ops.onednn.qlinear_prepack(weight, list(x.shape)))
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, packed[0], scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return multiply


def _runs(work: Callable[[], object]) -> bool:
    try:
        work()
    except (RuntimeError, NotImplementedError, AttributeError):  # torch has no such product on this device
        return False
    return True
