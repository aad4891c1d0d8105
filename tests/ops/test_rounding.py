"""Rounding weights: the nearest code at the scale that is stored, and scales that leave little error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwenlet.errors import CheckpointError
from qwenlet.ops import rounding
from qwenlet.ops.packing import from_gptq, to_gptq
from qwenlet.ops.rounding import encode, group_scales, round_to_nearest

KINDS = [(4, True), (4, False), (8, True), (8, False)]


def weights(rows: int = 48, columns: int = 256, seed: int = 0) -> Tensor:
    """Heavy-tailed, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return 0.02 * x * (1 + torch.rand(rows, columns, generator=generator).pow(8) * 4)


def squared_error(weight: Tensor, **options: object) -> float:
    return float((round_to_nearest(weight, **options).dequantize() - weight).square().sum())  # type: ignore[arg-type]


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize(("bits", "sym"), KINDS)
def test_every_weight_has_its_nearest_code(bits: int, sym: bool, mse: bool) -> None:
    """At the float16 scale that is stored, not at the one it was rounded from."""
    weight = weights(8, 64)
    quantized = round_to_nearest(weight, bits, 32, sym=sym, mse=mse)
    zeros = torch.full((8, 2), 1 << (bits - 1)) if quantized.zeros is None else quantized.zeros
    assert (quantized.zeros is None) == sym
    levels = (torch.arange(1 << bits) - zeros[..., None].float()) * quantized.scales.float()[..., None]  # (N, G, 2^b)
    best = (weight.view(8, 2, 32, 1) - levels[:, :, None]).abs().amin(-1).view(8, 64)
    assert torch.allclose((quantized.dequantize() - weight).abs(), best, atol=1e-7)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "sym"), KINDS)
def test_the_search_leaves_less_error(bits: int, sym: bool, group_size: int) -> None:
    weight = weights()
    options = {"bits": bits, "group_size": group_size, "sym": sym}
    plain, searched = squared_error(weight, mse=False, **options), squared_error(weight, mse=True, **options)
    assert searched < plain * (0.8 if bits == 4 and sym else 0.96 if bits == 4 else 1.0)


@pytest.mark.parametrize("sym", [True, False])
def test_eight_tries_do_what_eighty_do(monkeypatch: pytest.MonkeyPatch, sym: bool) -> None:
    weight = weights()
    few = squared_error(weight, bits=4, group_size=64, sym=sym)
    monkeypatch.setitem(rounding._SHARES, 4, tuple(1.1 - 0.0075 * i for i in range(80)))
    assert few < 1.015 * squared_error(weight, bits=4, group_size=64, sym=sym)


@pytest.mark.parametrize("sym", [True, False])
def test_important_columns_count_for_more(sym: bool) -> None:
    weight, importance = weights(), torch.rand(256).pow(4) + 0.01

    def weighted_error(counts: Tensor | None) -> float:
        scales, zeros = group_scales(weight, 4, 64, sym, importance=counts)
        middle = 8.0 if zeros is None else zeros.float().repeat_interleave(64, 1)
        values = (encode(weight, scales, zeros, 4) - middle) * scales.float().repeat_interleave(64, 1)
        return float(((values - weight).square() * importance).sum())

    assert weighted_error(importance) < 0.93 * weighted_error(None)
    assert weighted_error(torch.full((256,), 7.0)) == pytest.approx(weighted_error(None), rel=1e-3)


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [-1.0, 1.0], ids=["all negative", "all positive"])
def test_one_sided_groups_fit_a_gptq_file(bits: int, mse: bool, shift: float) -> None:
    """GPTQ v1 stores zero points less one: 0 can't be said, nor 256 in a byte."""
    weight = weights().abs() * shift + shift
    quantized = round_to_nearest(weight, bits, 64, sym=False, mse=mse)
    assert quantized.zeros is not None
    assert 1 <= int(quantized.zeros.min()) <= int(quantized.zeros.max()) <= (1 << bits) - 1
    back = from_gptq(to_gptq(quantized), bits, 64)
    assert torch.equal(back.dequantize(), quantized.dequantize())
    assert (quantized.dequantize() - weight).abs().max() < 2.5 / ((1 << bits) - 2)


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize(("bits", "sym"), KINDS)
def test_zeros_stay_zeros_and_tiny_weights_do_no_harm(bits: int, sym: bool, mse: bool) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 1e-12  # far below what float16 can scale
    weight[2, 5] = 1.0
    quantized = round_to_nearest(weight, bits, 32, sym=sym, mse=mse)
    assert bool((quantized.scales != 0).all())
    assert bool(quantized.scales.isfinite().all())
    values = quantized.dequantize()
    assert not values[0].any()
    assert values[1].abs().max() < 1e-7
    assert values[2, 5] == pytest.approx(1.0, abs=0.07)
    assert not values[2, :5].any()


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_what_has_no_scale_is_refused(bad: float, sym: bool, mse: bool) -> None:
    weight = weights()
    weight[40, 200] = bad
    with pytest.raises(CheckpointError, match="NaN, infinite or huge"):
        group_scales(weight, 4, 64, sym, mse)


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(33, 128)
    whole = round_to_nearest(weight, 4, 64)
    monkeypatch.setattr(rounding, "SLICE", 128 * 5)
    sliced = round_to_nearest(weight, 4, 64)
    assert torch.equal(whole.codes, sliced.codes)
    assert torch.equal(whole.scales, sliced.scales)


def test_half_precision_weights_are_read_as_they_are() -> None:
    weight = weights().bfloat16()
    assert torch.equal(round_to_nearest(weight, 4, 64).codes, round_to_nearest(weight.float(), 4, 64).codes)


@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]), st.booleans())
def test_errors_stay_within_half_a_step_of_the_plain_range(
    seed: int, kind: tuple[int, bool], size: float, mse: bool
) -> None:
    bits, sym = kind
    weight = weights(3, 64, seed) * size
    plain, plain_zeros = group_scales(weight, bits, 32, sym, mse=False)
    step = plain.float().repeat_interleave(32, 1)
    codes = encode(weight, plain, plain_zeros, bits)
    assert int(codes.max()) < 1 << bits
    off = (round_to_nearest(weight, bits, 32, sym=sym, mse=False).dequantize() - weight).abs()
    # at the ends of the range: a zero point that was rounded moves them by half a step, float16 the steps' sum
    steps = (0.5 if sym else 1.0) + (1 << bits) * 2.0**-11
    assert bool((off <= steps * step + 2.0**-24 * (1 << bits)).all())
    if mse:
        searched = round_to_nearest(weight, bits, 32, sym=sym).dequantize()
        # clipped, but never by more than the range it gave up
        assert bool(((searched - weight).abs() <= 6.5 * step + 2.0**-24 * (1 << bits)).all())
