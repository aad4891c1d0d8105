"""Products with weights: floats row by row, or four and eight bits in tiles.

A weight is a Tensor [N, K] in bfloat16, float16 or float32, or `Tiles` of 4 or 8 bits as `on_device` gives them. One
row goes through one_row.py, up to `ROWS` through few_rows.py, more through torch.

Dimension letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlet.ops.packing import Tiles
from qwenlet.ops.triton import ROWS
from qwenlet.ops.triton.codes import MAGIC, MINIMUMS, SYMMETRIC, ZEROS
from qwenlet.ops.triton.few_rows import codes_rows, float_rows
from qwenlet.ops.triton.interpreter import repair
from qwenlet.ops.triton.one_row import codes_row, float_row
from qwenlet.ops.triton.scratch import Scratch
from qwenlet.ops.triton.unpack import unpack

Weight = Tensor | Tiles

_PROGRAMS = 264  # two for each of a Hopper's 132 processors: what a launch should have to keep its memory busy
_MOST_SPLITS = 16


def on_device(tiles: Tiles, device: torch.device | str) -> Tiles:
    """The same weight where the kernels read it; the columns' order becomes int32."""

    def moved(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(device)

    weight, scales = tiles.weight.to(device), tiles.scales.to(device)
    order = None if tiles.order is None else tiles.order.to(device, torch.int32)
    return replace(
        tiles, weight=weight, scales=scales, zeros=moved(tiles.zeros), minimums=moved(tiles.minimums), order=order
    )


def norm_linear(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    scratch: Scratch,
    out: Tensor | None = None,
) -> Tensor:
    """RMSNorm(x) W^T + b in one launch, or x W^T + b where `norm` is None.

    Args:
        x: [M, K] in bfloat16, float16 or float32, M at most `ROWS`; a weight in floats has the same dtype.
        norm: [K], the norm's weight.
        bias: [N] of any float dtype.
        out: [M, N] of any float dtype, written to; None: a new one in x's dtype.
    Returns:
        [M, N]; sums are in float32.
    """
    y = x.new_empty(len(x), _outputs(weight)) if out is None else out
    return _launch(x, norm, eps, weight, None, bias, None, y, scratch)


def linear_add(x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None, *, scratch: Scratch) -> Tensor:
    """residual += x W^T + b in one launch; x [M, K], residual [M, N] in any float dtype, changed and given back."""
    return _launch(x, None, 0.0, weight, None, bias, residual, residual, scratch)


def norm_swiglu(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    up: Weight,
    gate: Weight,
    *,
    scratch: Scratch,
    out: Tensor | None = None,
) -> Tensor:
    """(n U^T) * silu(n G^T) for n = RMSNorm(x), in one launch: x [M, K] -> [M, N] in x's dtype.

    `up` and `gate` are w1 and w2 of the published model, of one shape and kind: both floats, or both codes of as many
    bits with groups of one size and kind and the columns in one order.
    """
    y = x.new_empty(len(x), _outputs(up)) if out is None else out
    return _launch(x, norm, eps, up, gate, None, None, y, scratch)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, scratch: Scratch | None = None) -> Tensor:
    """x W^T + b for any number of rows: x [M, K] -> [M, N] in x's dtype.

    Many rows are multiplied by torch, with a weight in codes turned into x's dtype first. Without `scratch` more than
    one is many.
    """
    if len(x) == 1 or (scratch is not None and 0 < len(x) <= ROWS):
        return _launch(x, None, 0.0, weight, None, bias, None, x.new_empty(len(x), _outputs(weight)), scratch)
    floats = weight if isinstance(weight, Tensor) else dequantize(weight, x.dtype)
    return F.linear(x, floats, None if bias is None else bias.to(x.dtype))


def dequantize(weight: Tiles, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`, columns in the inputs' own order."""
    repair()
    rows, columns = weight.rows, _inputs(weight)
    y = torch.empty(rows, columns, dtype=dtype, device=weight.weight.device)
    form = _form(weight)
    per_step = 64
    grid = (len(weight.weight), -(-weight.weight.shape[1] // per_step))
    words, scales, extra = _parts(weight)
    order = weight.order
    unpack[grid](
        words, scales, extra, words if order is None else order, y, rows, columns, **form, BW=per_step,
        ORDER=order is not None, num_warps=4,
    )  # fmt: skip
    return y


def _outputs(weight: Weight) -> int:
    return weight.shape[0] if isinstance(weight, Tensor) else weight.rows


def _inputs(weight: Weight) -> int:
    return weight.shape[1] if isinstance(weight, Tensor) else weight.weight.shape[1] * 32 // weight.bits


def _form(weight: Tiles) -> dict[str, Any]:
    """What a kernel is compiled for."""
    kind = MINIMUMS if weight.minimums is not None else SYMMETRIC if weight.zeros is None else ZEROS
    return {"BITS": weight.bits, "GROUP": weight.group_size, "KIND": kind.value}


def _parts(weight: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales, and zero points or minimums; what is not there is never read, so anything may stand for it."""
    extra = weight.minimums if weight.zeros is None else weight.zeros
    return weight.weight, weight.scales, weight.scales if extra is None else extra


def _check(x: Tensor, weight: Weight, gate: Weight | None) -> None:
    assert 0 < len(x) <= ROWS, f"{len(x)} rows, expected 1 to {ROWS}"
    assert x.is_contiguous(), f"x has strides {x.stride()}"
    assert x.shape[1] == _inputs(weight), f"x has {x.shape[1]} columns, the weight {_inputs(weight)}"
    for each in (weight, gate):
        if isinstance(each, Tensor):
            assert each.dtype == x.dtype, f"a weight of {each.dtype} for x in {x.dtype}"
            assert each.is_contiguous(), f"a weight has strides {each.stride()}"
        elif each is not None:
            assert each.bits in (4, 8), f"tiles of {each.bits} bits, expected 4 or 8"
            assert each.order is None or each.order.dtype == torch.int32, "take the weight through `on_device`"
    if isinstance(weight, Tiles) and gate is not None:
        assert isinstance(gate, Tiles), "up is in codes and gate in floats"
        assert _form(weight) == _form(gate), f"up and gate differ: {_form(weight)}, {_form(gate)}"
        orders = (weight.order, gate.order)
        assert (orders[0] is None) == (orders[1] is None), "one of up and gate has its columns in an order of its own"


def _launch(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: Weight,
    gate: Weight | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    scratch: Scratch | None,
) -> Tensor:
    repair()
    _check(x, weight, gate)
    m, (n, k) = len(x), (_outputs(weight), _inputs(weight))
    flags = {"NORM": norm is not None, "BIAS": bias is not None, "RESIDUAL": residual is not None,
             "SWIGLU": gate is not None}  # fmt: skip
    # what is not there is never read, so x stands for it
    ends = (x if bias is None else bias, x if residual is None else residual, y)
    start = x if norm is None else norm
    if isinstance(weight, Tensor):
        weights: tuple[Tensor, ...] = (weight, weight if gate is None else gate)  # type: ignore[assignment]
    else:
        second = _parts(weight if gate is None else gate)  # type: ignore[arg-type]
        weights = (x if weight.order is None else weight.order, *_parts(weight), *second)
        flags["ORDER"] = weight.order is not None
    if m == 1:
        if isinstance(weight, Tensor):
            shape = _float_row_shape(n, k, gate is not None)
            float_row[(-(-n // shape["BN"]),)](x, start, *weights, *ends, eps, n, k, **shape, **flags)
        else:
            shape = _codes_row_shape(weight, gate is not None)
            codes_row[(-(-n // shape["BN"]),)](
                x, start, *weights, *ends, eps, MAGIC.value, n, k, **_form(weight), **shape, **flags
            )
        return y
    assert scratch is not None, f"{m} rows need scratch"
    memory = (scratch.partials, scratch.counters)
    if isinstance(weight, Tensor):
        shape = _float_rows_shape(m, n, k, x.itemsize, gate is not None)
        grid = (-(-n // shape["BN"]), shape["SPLIT"])
        _check_scratch(scratch, grid, shape, gate)
        float_rows[grid](x, start, *weights, *ends, *memory, m, eps, n, k, **shape, **flags)
    else:
        shape = _codes_rows_shape(m, weight, x.itemsize, gate is not None)
        grid = (-(-n // shape["BN"]), shape["SPLIT"])
        _check_scratch(scratch, grid, shape, gate)
        codes_rows[grid](x, start, *weights, *ends, *memory, m, eps, n, k, **_form(weight), **shape, **flags)
    return y


def _check_scratch(scratch: Scratch, grid: tuple[int, int], shape: dict[str, int], gate: Weight | None) -> None:
    if grid[1] == 1:
        return
    floats = grid[0] * grid[1] * shape["BM"] * shape["BN"] * (1 if gate is None else 2)
    assert floats <= len(scratch.partials), f"scratch holds {len(scratch.partials)} floats, {floats} are needed"
    assert grid[0] <= len(scratch.counters), f"scratch holds {len(scratch.counters)} counters, {grid[0]} are needed"


# ------------------------------------------------------------------------------- shapes of launches, by shape alone


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _float_row_shape(n: int, k: int, swiglu: bool) -> dict[str, int]:
    """Some 16 KB of weights for each of 128 threads' eight loads, or half of it of two weights."""
    columns = min(1024, max(64, _power_of_two(k)))
    return {"BN": 2 if swiglu or n < 4 * _PROGRAMS else 4, "BK": columns, "num_warps": 4}


def _codes_row_shape(weight: Tiles, swiglu: bool) -> dict[str, int]:
    """A tile is 16 outputs; two of them share what is done with x where there are enough."""
    tiles = len(weight.weight)
    words = min(64, max(16, _power_of_two(weight.weight.shape[1])))
    return {"BN": 32 if tiles >= _PROGRAMS and not swiglu else 16, "BW": words, "num_warps": 8 if words == 64 else 4}


def _splits(blocks: int, steps: int) -> int:
    """Programs that share one block of outputs, so that there are enough of them, each with two steps or more."""
    split = 1
    while blocks * split * 2 <= _PROGRAMS and split * 4 <= steps and split < _MOST_SPLITS:
        split *= 2
    return split


def _float_rows_shape(m: int, n: int, k: int, itemsize: int, swiglu: bool) -> dict[str, int]:
    outputs, columns = (32, 128) if itemsize == 2 else (32, 32)
    columns = min(columns, max(16, _power_of_two(k)))
    split = _splits(-(-n // outputs), -(-k // columns))
    return {"BM": max(16, _power_of_two(m)), "BN": outputs, "BK": columns, "SPLIT": split, "num_warps": 4,
            "num_stages": 3}  # fmt: skip


def _codes_rows_shape(m: int, weight: Tiles, itemsize: int, swiglu: bool) -> dict[str, int]:
    words = 16 if itemsize == 4 else 32
    split = _splits(-(-weight.rows // 32), -(-weight.weight.shape[1] // words))
    return {"BM": max(16, _power_of_two(m)), "BN": 32, "BW": words, "SPLIT": split, "num_warps": 4,
            "num_stages": 2}  # fmt: skip
