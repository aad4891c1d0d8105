"""Which linear runs where; prepacked and tiled ones: the same numbers as F.linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwenlet import linear
from qwenlet.errors import ConfigError
from qwenlet.linear import (
    PrepackedLinear,
    StreamedLinear,
    TiledLinear,
    choose_linear,
    new_linear,
    prepack_works,
    replace_linear,
)
from qwenlet.ops import cpu

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the package was built without a compiler")
needs_prepack = pytest.mark.skipif(not prepack_works()[0], reason=f"no prepacking here: {prepack_works()[1]}")


@needs_prepack
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17, 512])
def test_prepacked_equals_linear_within_rounding(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(96, 160).bfloat16(), torch.randn(rows, 160).bfloat16()
    b = torch.randn(96).bfloat16() if bias else None
    y = PrepackedLinear(weight, b)(x)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert y.shape == (rows, 96)
    assert y.dtype == torch.bfloat16
    # one rounding to bfloat16 (relative 2^-8), and float32 sums of 160 terms of which some cancel
    assert torch.allclose(y.double(), exact, rtol=2**-8, atol=1e-4)


@needs_prepack
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (96, 160), (33, 128), (384, 64)])
def test_unpack_gives_the_weight_back(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).bfloat16()
    packed = PrepackedLinear(weight, None)
    assert (packed.out_features, packed.in_features) == shape
    assert torch.equal(packed.unpack(), weight)
    assert packed.unpack().is_contiguous()


@needs_prepack
def test_packing_keeps_no_hold_of_the_source() -> None:
    """The source may be a mapped file: later writes to it must not show, and training must not reach it."""
    weight = nn.Parameter(torch.randn(64, 64).bfloat16())
    before = weight.detach().clone()
    packed = PrepackedLinear(weight, None)
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(packed.unpack(), before)
    assert not packed.packed.requires_grad


def test_prepacking_gives_a_reason_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepack_works()[1]
    fresh = prepack_works.__wrapped__  # past the memory of the first answer
    assert fresh() == prepack_works()

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fresh() == (False, "this torch was built without oneDNN")


@needs_prepack
def test_a_torch_without_the_operator_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'\nmore")

    monkeypatch.setattr(linear.PrepackedLinear, "__init__", missing)
    works, reason = prepack_works.__wrapped__()
    assert not works
    assert reason.startswith("this torch lacks oneDNN's prepacked linear (")
    assert "\n" not in reason


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("isa", cpu.available())
def test_floats_on_a_cpu_run_in_tiles(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLET_ISA", isa)
    assert choose_linear("tiled", CPU, dtype) == (TiledLinear, f"{isa} kernels, QWENLET_ISA={isa}")
    assert choose_linear("torch", CPU, dtype) == (None, "asked for")
    if (isa, dtype) == ("portable", torch.float32):
        assert choose_linear("auto", CPU, dtype) == (None, "prefill by plain C++ takes two to three times as long")
    else:
        assert choose_linear("auto", CPU, dtype) == choose_linear("tiled", CPU, dtype)


def test_what_has_no_kernels_runs_on_torch_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_linear("auto", CPU, torch.float16) == (None, "other kernels are for bfloat16 or float32 on a CPU")
    assert choose_linear("auto", torch.device("cuda"), torch.float32)[0] is None
    for asked, dtype in (("tiled", torch.float16), ("streamed", torch.float32), ("prepacked", torch.float32)):
        with pytest.raises(ConfigError, match=f"linear='{asked}' is for bfloat16.* on a CPU, not {dtype} on cpu"):
            choose_linear(asked, CPU, dtype)
    monkeypatch.setenv("QWENLET_ISA", "torch")
    assert choose_linear("auto", CPU, torch.float32) == (None, "QWENLET_ISA=torch")
    with pytest.raises(ConfigError, match="has no kernels here: QWENLET_ISA=torch"):
        choose_linear("tiled", CPU, torch.float32)


@needs_kernels
@pytest.mark.parametrize("shape", [(5, 7), (33, 100), (96, 160)])
def test_float32_tiles_take_any_shape(shape: tuple[int, int]) -> None:
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(3, shape[1])
    made = new_linear(TiledLinear, weight, bias)
    assert isinstance(made, TiledLinear)
    assert (made.out_features, made.in_features) == shape
    torch.testing.assert_close(made(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert isinstance(new_linear(TiledLinear, torch.randn(5, 24).bfloat16(), None), StreamedLinear)


@needs_kernels
@pytest.mark.parametrize("isa", cpu.available())
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", [(1, 16), (5, 32), (17, 48), (16, 80), (1, 1), (5, 24), (17, 40), (33, 100)])
def test_bfloat16_of_narrow_and_odd_shapes(
    shape: tuple[int, int], rows: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENLET_ISA", isa)
    weight, bias, x = (torch.randn(size).bfloat16() for size in (shape, (shape[0],), (rows, shape[1])))
    made = new_linear(TiledLinear, weight, bias)
    assert type(made) is (StreamedLinear if shape[1] % 16 else TiledLinear)
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(made(x).double(), exact, rtol=2**-7, atol=1e-3)


def test_replace_linear_walks_the_dots() -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    new = nn.Identity()
    replace_linear(root, "1.0", new)
    assert root[1][0] is new
    replace_linear(root, "0", new)
    assert root[0] is new
