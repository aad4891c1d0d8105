"""Products by the kernels, in Triton's interpreter, against `reference.linear_float` and the model's own norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlet.model import RMSNorm
from qwenlet.ops import packing, reference
from qwenlet.ops.packing import QuantTensor

pytest.importorskip("triton")

from qwenlet.ops.triton import linear
from qwenlet.ops.triton.scratch import Scratch

ROWS = (1, 2, 3, 5, 8, 16, 17)
KINDS = ("symmetric", "zeros", "minimums")
# of the largest result: a product of few thousand numbers, summed in float32, rounded to the dtype once or twice
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def scratch() -> Scratch:
    memory = Scratch("cpu", floats=1 << 20, counters=1 << 8)
    memory.partials.fill_(float("nan"))  # whoever reads what nobody wrote shows it
    return memory


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(rows: int, columns: int, bits: int, group: int, kind: str, ordered: bool, seed: int = 1) -> QuantTensor:
    random = torch.Generator().manual_seed(seed)
    table = (rows, columns // group)
    return QuantTensor(
        bits,
        group,
        torch.randint(0, 1 << bits, (rows, columns), generator=random, dtype=torch.uint8),
        ((torch.rand(table, generator=random) + 0.1) * (0.16 / (1 << bits))).half(),
        torch.randint(0, 1 << bits, table, generator=random, dtype=torch.uint8) if kind == "zeros" else None,
        numbers(*table, seed=seed).mul(0.05).half() if kind == "minimums" else None,
        torch.randperm(columns, generator=random) if ordered else None,
    )


def normed(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    norm = RMSNorm(x.shape[1], eps)
    norm.weight.data = weight.float()
    return norm(x.float()).detach()


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    largest = wanted.abs().max().item()
    assert (found.float() - wanted).abs().max().item() <= CLOSE[dtype] * largest


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats(rows: int, dtype: torch.dtype, scratch: Scratch) -> None:
    """All three launches of a layer; 42 outputs and 208 columns fill no block."""
    x, norm = numbers(rows, 208, seed=1, dtype=dtype), numbers(208, seed=2).abs().add(0.5).to(dtype)
    a, b = (numbers(42, 208, seed=seed).mul(0.1).to(dtype) for seed in (3, 4))
    bias, residual = numbers(42, seed=5, dtype=dtype), numbers(rows, 42, seed=6, dtype=dtype)
    n = normed(x, norm)
    found = linear.norm_linear(x, norm, 1e-6, a, bias, scratch=scratch)
    assert found.dtype == dtype
    assert_close(found, n @ a.float().T + bias.float(), dtype)
    wanted = residual.float() + x.float() @ a.float().T
    assert linear.linear_add(x, a, residual, scratch=scratch) is residual
    assert_close(residual, wanted, dtype)
    wanted = (n @ a.float().T) * F.silu(n @ b.float().T)
    assert_close(linear.norm_swiglu(x, norm, 1e-6, a, b, scratch=scratch), wanted, dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes(rows: int, kind: str, bits: int, scratch: Scratch) -> None:
    for group, ordered in ((32, False), (64, True), (128, False)):
        weight = codes(40, 384, bits, group, kind, ordered)
        x = numbers(rows, 384, seed=2)
        tiles = linear.on_device(packing.to_tiles(weight), "cpu")
        wanted = reference.linear_float(x, weight)
        found = linear.norm_linear(x, None, 0.0, tiles, scratch=scratch)
        assert_close(found, wanted, torch.float32)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_with_all_that_goes_along(rows: int, ordered: bool, bits: int, scratch: Scratch) -> None:
    x, norm = numbers(rows, 192, seed=1), numbers(192, seed=2).abs() + 0.5
    a, b = codes(24, 192, bits, 32, "zeros", ordered), codes(24, 192, bits, 32, "zeros", False, seed=7)
    if ordered:
        b = packing.QuantTensor(b.bits, 32, b.codes, b.scales, b.zeros, order=a.order)
    up, gate = (linear.on_device(packing.to_tiles(weight), "cpu") for weight in (a, b))
    bias, residual, n = numbers(24, seed=3), numbers(rows, 24, seed=4), normed(x, norm)
    found = linear.norm_linear(x, norm, 1e-6, up, bias, scratch=scratch)
    assert_close(found, reference.linear_float(n, a, bias), torch.float32)
    wanted = residual + reference.linear_float(x, a)
    assert_close(linear.linear_add(x, up, residual, scratch=scratch), wanted, torch.float32)
    wanted = reference.linear_float(n, a) * F.silu(reference.linear_float(n, b))
    assert_close(linear.norm_swiglu(x, norm, 1e-6, up, gate, scratch=scratch), wanted, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4])
def test_codes_for_half_precision(dtype: torch.dtype, rows: int, scratch: Scratch) -> None:
    weight = codes(40, 256, 4, 128, "symmetric", False)
    x = numbers(rows, 256, seed=2, dtype=dtype)
    tiles = linear.on_device(packing.to_tiles(weight), "cpu")
    found = linear.norm_linear(x, None, 0.0, tiles, scratch=scratch)
    assert found.dtype == dtype
    assert_close(found, reference.linear_float(x, weight), dtype)


@pytest.mark.parametrize("rows", [1, 6])
def test_columns_shared_by_programs(rows: int, scratch: Scratch) -> None:
    """A narrow, long weight is cut along its columns; twice the same numbers, and the counters end where they began."""
    weight, x = codes(16, 4096, 4, 32, "symmetric", False), numbers(rows, 4096, seed=2)
    tiles = linear.on_device(packing.to_tiles(weight), "cpu")
    first = linear.norm_linear(x, None, 0.0, tiles, scratch=scratch)
    assert_close(first, reference.linear_float(x, weight), torch.float32)
    assert torch.equal(first, linear.norm_linear(x, None, 0.0, tiles, scratch=scratch))
    floats = weight.dequantize()
    assert_close(linear.norm_linear(x, None, 0.0, floats, scratch=scratch), x @ floats.T, torch.float32)
    assert not scratch.counters.any()


def test_a_row_does_not_see_its_neighbours(scratch: Scratch) -> None:
    weight = linear.on_device(packing.to_tiles(codes(32, 128, 4, 32, "zeros", False)), "cpu")
    x = numbers(5, 128, seed=2, dtype=torch.bfloat16)
    others = torch.cat([x[:2], x[3:] * 100])
    alone = linear.norm_linear(x, None, 0.0, weight, scratch=scratch)
    assert torch.equal(alone[:2], linear.norm_linear(others, None, 0.0, weight, scratch=scratch)[:2])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ordered", [False, True])
def test_many_rows_and_dequantizing(bits: int, kind: str, ordered: bool) -> None:
    weight = codes(40, 96, bits, 32, kind, ordered)
    tiles = linear.on_device(packing.to_tiles(weight), "cpu")
    assert torch.equal(linear.dequantize(tiles, torch.float32), weight.dequantize())
    assert linear.dequantize(tiles, torch.bfloat16).equal(weight.dequantize().bfloat16())
    x = numbers(70, 96, seed=3)
    assert_close(linear.linear(x, tiles, numbers(40, seed=4)), reference.linear_float(x, weight, numbers(40, seed=4)),
                 torch.float32)  # fmt: skip


def test_one_row_needs_no_scratch() -> None:
    weight, x = codes(40, 96, 4, 32, "symmetric", False), numbers(1, 96, seed=3)
    found = linear.linear(x, linear.on_device(packing.to_tiles(weight), "cpu"))
    assert_close(found, reference.linear_float(x, weight), torch.float32)


def test_logits_in_another_dtype(scratch: Scratch) -> None:
    x, weight = numbers(2, 64, seed=1, dtype=torch.bfloat16), numbers(40, 64, seed=2, dtype=torch.bfloat16)
    out = torch.empty(2, 40)
    assert linear.norm_linear(x, None, 0.0, weight, scratch=scratch, out=out) is out
    assert_close(out, x.float() @ weight.float().T, torch.float32)
