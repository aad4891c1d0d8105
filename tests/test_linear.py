"""Prepacked linears: the same numbers as F.linear, and the weights can be had back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwenlet import linear
from qwenlet.linear import PrepackedLinear, prepack_works, replace_linear

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


def test_replace_linear_walks_the_dots() -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    new = nn.Identity()
    replace_linear(root, "1.0", new)
    assert root[1][0] is new
    replace_linear(root, "0", new)
    assert root[0] is new
