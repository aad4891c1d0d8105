"""Kernels for a CPU: C++ built with the package, one file per instruction set, chosen at run time.

Where the package was built without a compiler there are none: floats run on torch's own operators, quantized weights on
the plain definition. `status` says what will run and why. `QWENLET_ISA` forces one of amx, avx512_bf16, avx512, avx2,
portable, or torch (no kernels).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlet.errors import ConfigError
from qwenlet.ops import reference
from qwenlet.ops.packing import TILE_ROWS, Tiles, floats_from_tiles, from_tiles


@dataclass(frozen=True)
class Status:
    """Which instruction set's kernels run: None for none of them, and why."""

    isa: str | None
    reason: str


@lru_cache(maxsize=1)
def _module() -> ModuleType | None:
    try:
        from qwenlet.ops.cpu import _kernels
    except ImportError:
        return None
    return _kernels


def kernels() -> ModuleType:
    """The native module; ask `status` first whether there is one."""
    module = _module()
    assert module is not None, "no kernels were built"
    return module


def available() -> list[str]:
    """Instruction sets with kernels that this processor runs, fastest first."""
    module = _module()
    return [] if module is None else list(module.available())


def status() -> Status:
    """Which kernels run here.

    Raises:
        ConfigError: QWENLET_ISA names kernels that are not there.
    """
    return _status(os.environ.get("QWENLET_ISA", ""))


@lru_cache(maxsize=8)
def _status(forced: str) -> Status:
    names = available()
    if forced == "torch":
        return Status(None, "QWENLET_ISA=torch")
    if forced:
        if forced not in names:
            raise ConfigError(
                f"QWENLET_ISA is {forced!r}, but here there are {', '.join([*names, 'torch'])}",
                hint="unset QWENLET_ISA",
            )
        return Status(forced, f"QWENLET_ISA={forced}")
    if not names:
        return Status(None, "the package was built without a compiler; pip install --force-reinstall qwenlet with one")
    return Status(names[0], "the fastest of " + ", ".join(names))


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for bfloat16 x [M, K], W [N, K], b [N] -> [M, N], summed in float32 and rounded once.

    Up to 8 rows stream the weights at the memory's speed, each row in an order that depends on K alone, so a row's
    result is the same bits beside any others. More rows go to torch's blocked product, which does not promise that.
    """
    isa, module = status().isa, _module()
    rows = x.shape[0]
    if isa is None or module is None or not 0 < rows <= module.MAX_ROWS or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    assert x.dtype == weight.dtype == torch.bfloat16, f"{x.dtype} and {weight.dtype}, expected bfloat16"
    assert x.shape[1] == weight.shape[1], f"x has {x.shape[1]} columns, the weight {weight.shape[1]}"
    assert weight.is_contiguous(), f"weight has strides {weight.stride()}"
    x = x.contiguous()
    y = x.new_empty(rows, weight.shape[0])
    module.linear_bf16(
        isa,
        torch.get_num_threads(),
        x.data_ptr(),
        rows,
        weight.data_ptr(),
        *weight.shape,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y


def linear_quant(x: Tensor, weight: Tiles, bias: Tensor | None) -> Tensor:
    """`reference.linear_int` for x [M, K] of any float dtype -> [M, N] in that dtype.

    A row's result is the same bits whatever the rows beside it. Without kernels the reference itself runs.

    Args:
        bias: [N] float32 or None.
    """
    if status().isa is None or not len(x):
        if weight.bits in (16, 32):
            return F.linear(x, tiles_to_float(weight, x.dtype), None if bias is None else bias.to(x.dtype))
        return reference.linear_int(x, from_tiles(weight), bias).to(x.dtype)
    return linear_tiles(x, weight, bias)


_BACK_COLUMNS = 256  # of a weight that stand in memory in floats at a time
_BACK_LEAST_ROWS = 24  # from which it pays to unpack a weight into the first cache


def linear_back(grad: Tensor, weight: Tiles) -> Tensor:
    """grad W for grad [M, N] -> [M, K] in its dtype: how a linear's inputs change what its outputs change.

    Products are of bfloat16 where the processor has them and the weight is not float32, of float32 else. W is
    dequantized into the first cache where there are kernels for that, else some columns at a time.
    """
    columns = weight.weight.shape[1] * 32 // weight.bits
    if weight.bits in (4, 8) and _backs(len(grad), weight.rows, columns):
        out = _back(grad, weight_numbers(weight, None), columns)
        if weight.order is None:
            return out
        ordered = torch.empty_like(out)
        ordered[:, weight.order] = out
        return ordered
    dtype = torch.float32 if weight.bits == 32 or not _has_bf16() else torch.bfloat16
    rows, out = grad.to(dtype), grad.new_empty(len(grad), columns)
    for at in range(0, columns, _BACK_COLUMNS):
        end = min(at + _BACK_COLUMNS, columns)
        piece = F.linear(rows, tiles_columns(weight, at, end, dtype))
        if weight.order is None:
            out[:, at:end] = piece
        else:
            out[:, weight.order[at:end]] = piece.to(out.dtype)
    return out


def rows_back(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W for bfloat16 grad [M, N] and W [N, K] row by row -> [M, K]; any other dtype or device by torch."""
    both = grad.dtype == weight.dtype == torch.bfloat16 and grad.device.type == "cpu"
    # by AMX torch's product is the quicker one
    if not both or not weight.is_contiguous() or status().isa == "amx" or not _backs(len(grad), *weight.shape):
        return grad @ weight
    return _back(grad, (0, 0, *weight.shape, weight.data_ptr(), 0, 0, 0, 0), weight.shape[1])


def _backs(rows: int, outputs: int, columns: int) -> bool:
    """Whether kernels take the way back through a weight [outputs, columns]."""
    isa = status().isa
    step = 2 * TILE_ROWS if isa == "amx" else TILE_ROWS  # a register there takes 32 outputs
    if isa is None or rows < _BACK_LEAST_ROWS or outputs % step or columns % TILE_ROWS:
        return False
    return bool(kernels().has_back(isa))


def _back(grad: Tensor, weight: tuple[int, ...], columns: int) -> Tensor:
    dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
    rows = grad.to(torch.bfloat16).contiguous()
    out = torch.empty(len(rows), columns, dtype=dtype)
    kernels().linear_back(
        status().isa, torch.get_num_threads(), rows.data_ptr(), len(rows), out.itemsize * 8, out.data_ptr(), *weight
    )
    return out.to(grad.dtype)


@lru_cache(maxsize=1)
def _has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def tiles_columns(weight: Tiles, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Columns of a weight [N, K] as rows: [stop - start, N] in bfloat16 or float32, in the order they are stored.

    start and stop are multiples of the columns in a word.
    """
    per_word = 32 // weight.bits
    assert start % per_word == stop % per_word == 0, f"columns {start} to {stop} cut a word"
    isa = status().isa
    if isa is None:
        return tiles_to_float(replace(weight, order=None), dtype)[:, start:stop].T.contiguous()
    out = torch.empty(stop - start, weight.rows, dtype=dtype)
    bound = weight_numbers(weight, None)
    kernels().tiles_columns(isa, torch.get_num_threads(), start, stop, out.itemsize * 8, out.data_ptr(), *bound)
    return out


def tiles_to_float(weight: Tiles, dtype: torch.dtype) -> Tensor:
    """A weight in tiles as [N, K], columns in the inputs' own order."""
    if weight.bits in (16, 32):
        return floats_from_tiles(weight).to(dtype)
    return from_tiles(weight).dequantize().to(dtype)


_FLOAT_ROWS = 256  # of a product in sixteen bits that stand in memory in float32 at a time


def linear_tiles(x: Tensor, weight: Tiles, bias: Tensor | None) -> Tensor:
    """The same by the kernels, for quantized, bfloat16 (then x is rounded to bfloat16) and float32 weights."""
    isa, module = status().isa, kernels()
    assert isa is not None, "no kernels run here"
    # the result first, and floats for some of its rows at a time: in the other order the heap is left full of holes
    out = x.new_empty(len(x), weight.rows)
    step = module.MAX_BATCH if x.dtype == torch.float32 else _FLOAT_ROWS
    y = out if x.dtype == torch.float32 else torch.empty(min(step, len(x)), weight.rows)
    bound = weight_numbers(weight, bias)
    order = None if weight.order is None else weight.order.to(torch.int32)
    order_at = 0 if order is None else order.data_ptr()
    for at in range(0, len(x), step):
        piece = x[at : at + step].to(torch.float32).contiguous()
        to = y[at : at + step] if y is out else y[: len(piece)]
        module.linear_tiles(isa, torch.get_num_threads(), piece.data_ptr(), len(piece), to.data_ptr(), order_at, *bound)
        if y is not out:
            out[at : at + step] = to
    return out


def drop(x: Tensor, seed: int, share: float, onto: Tensor | None = None) -> Tensor:
    """x with about `share` of its entries 0, the others as they are: `x * reference.kept(...)`.

    Args:
        seed: 0 or more, below 2^63.
        onto: contiguous, like x: what is kept is added to it, in place.
    """
    isa = status().isa
    if isa is None or x.dtype not in (torch.bfloat16, torch.float32):
        kept = torch.where(reference.kept(x.shape, seed, share), x, 0.0)
        return kept if onto is None else onto.add_(kept)
    x = x.contiguous()
    out = torch.empty_like(x) if onto is None else onto
    assert (out.dtype, out.shape) == (x.dtype, x.shape), f"{out.dtype} {out.shape} is not like x"
    assert out.is_contiguous(), "onto is contiguous"
    least = reference.least_kept(share)
    numbers = (x.data_ptr(), x.itemsize * 8, x.numel(), seed, least, out.data_ptr(), onto is not None)
    kernels().drop(isa, torch.get_num_threads(), *numbers)
    return out


def draw(numbers: Sequence[int], settings: Sequence[float]) -> list[int]:
    """A token of each of R rows, -1 where its largest logit is not finite.

    Args:
        numbers: nine of each row, one row after the other: address of its float32 logits, how many; address of its seen
            ids (int64), of how often each stands in the reply (float32), how many; top_k; what the draw depends on: its
            seed (64 bits), choice, position.
        settings: six of each row: penalties (repetition, presence, frequency), temperature, top_p, min_p.
    """
    isa = status().isa
    assert isa is not None, "no kernels run here"
    rows = len(numbers) // 9
    # arrays, as these are made for every token
    parts = array("q", numbers), array("d", settings), array("q", bytes(8 * rows))
    kernels().draw(isa, torch.get_num_threads(), rows, *(part.buffer_info()[0] for part in parts))
    return list(parts[2])


def words_to_lines(words: Tensor) -> Tensor:
    """[C, N] int32 -> [ceil(N / 16), C, 16], padded with zeros: a GPTQ file's 64-byte lines in the tiles' order."""
    words = words.contiguous()
    count, columns = words.shape
    lines = torch.empty(-(-columns // TILE_ROWS), count, TILE_ROWS, dtype=torch.int32)
    kernels().words_to_lines(torch.get_num_threads(), words.data_ptr(), count, columns, lines.data_ptr())
    return lines


def weight_numbers(weight: Tiles, bias: Tensor | None) -> tuple[int, ...]:
    """bits, group, N, K and the addresses of everything, as the kernels take them."""
    columns = weight.weight.shape[1] * 32 // weight.bits
    parts = (weight.weight, weight.scales, weight.zeros, weight.minimums, bias)
    assert all(part is None or part.is_contiguous() for part in parts), "weights in tiles are contiguous"
    addresses = (0 if part is None else part.data_ptr() for part in parts)
    return (weight.bits, weight.group_size, weight.rows, columns, *addresses)
