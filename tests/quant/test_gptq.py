"""GPTQ alone: a textbook version finds the same codes, and what can go wrong with a Hessian is met."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenlet.errors import CheckpointError
from qwenlet.ops.rounding import group_scales, round_to_nearest
from qwenlet.quant.gptq import Hessian, gptq

ROWS, COLUMNS = 40, 256


def problem(seed: int = 0, tokens: int = 2000) -> tuple[Tensor, Tensor]:
    """A weight and inputs that are correlated and of very different sizes, as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(COLUMNS) + 0.1 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    sizes = 4 * torch.rand(COLUMNS, generator=generator).pow(3)
    x = (torch.randn(tokens, COLUMNS, generator=generator) * sizes) @ mixing
    return 0.02 * torch.randn(ROWS, COLUMNS, generator=generator), x


def hessian_of(x: Tensor) -> Hessian:
    hessian = Hessian(COLUMNS)
    for batch in x.split(300):
        hessian.add(batch)
    return hessian


def output_error(x: Tensor, weight: Tensor, quantized: Tensor) -> float:
    return float((x @ (quantized - weight).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("order", [{}, {"desc_act": True}, {"desc_act": True, "static_groups": True}])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True)])
def test_outputs_move_far_less_than_with_rounding(
    bits: int, sym: bool, order: dict[str, bool], group_size: int
) -> None:
    weight, x = problem()
    solution = gptq(weight, hessian_of(x), bits, group_size, sym=sym, **order)
    rounded = round_to_nearest(weight, bits, group_size, sym=sym)
    assert (solution.weight.zeros is None) == sym
    assert output_error(x, weight, solution.weight.dequantize()) < 0.65 * output_error(x, weight, rounded.dequantize())


def test_the_error_it_reports_is_the_one_that_is_measured() -> None:
    weight, x = problem()
    solution = gptq(weight, hessian_of(x), 4, 64, damp_percent=1e-4)
    assert solution.error == pytest.approx(output_error(x, weight, solution.weight.dequantize()), rel=0.01)


def textbook(weight: Tensor, x: Tensor, scales: Tensor, group_size: int, damp_percent: float, order: Tensor) -> Tensor:
    """Optimal brain quantization: one column after the other, by the inverse Hessian of those that are left."""
    w, h = weight.double().clone(), (x.double().T @ x.double()) / len(x)
    h.diagonal().add_(damp_percent * h.diagonal().mean())
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    left = order.tolist()
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        column, left = left[0], left[1:]
        scale = scales[:, column // group_size].double()
        code = (w[:, column] / scale).round().clamp(-8, 7)
        codes[:, column] = (code + 8).to(torch.uint8)
        error = (w[:, column] - code * scale) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0, 1:]
    return codes


@pytest.mark.parametrize("desc_act", [False, True])
def test_a_textbook_version_finds_the_same_codes(desc_act: bool) -> None:
    weight, x = problem(tokens=1000)
    weight = weight[:8]
    hessian = hessian_of(x)
    scales, _ = group_scales(weight, 4, 64, mse=False)
    order = hessian.sum.diagonal().argsort(descending=True) if desc_act else torch.arange(COLUMNS)
    expected = textbook(weight, x, scales, 64, 0.01, order)
    found = gptq(weight, hessian, 4, 64, mse=False, desc_act=desc_act, static_groups=True).weight
    assert torch.equal(found.scales, scales)
    assert found.order is None
    # a value in the middle between two codes may fall to either side
    assert (found.codes != expected).float().mean() < 0.002


def test_inputs_that_go_separate_ways_are_rounded_to_nearest() -> None:
    """A diagonal Hessian has nothing to make up for errors with."""
    weight, _ = problem()
    hessian = Hessian(COLUMNS)
    hessian.sum, hessian.tokens = torch.diag(torch.rand(COLUMNS) + 0.5), 1
    solution, rounded = gptq(weight, hessian, 4, 64, mse=False), round_to_nearest(weight, 4, 64, mse=False)
    assert torch.equal(solution.weight.codes, rounded.codes)
    assert torch.equal(solution.weight.scales, rounded.scales)


def test_act_order_sorts_by_activity_and_says_so() -> None:
    weight, x = problem()
    hessian = hessian_of(x)
    solution = gptq(weight, hessian, 4, 64, desc_act=True)
    assert solution.weight.order is not None
    activity = hessian.sum.diagonal()[solution.weight.order]
    assert bool((activity[1:] <= activity[:-1]).all())


@pytest.mark.parametrize("order", [{}, {"desc_act": True}, {"desc_act": True, "static_groups": True}])
def test_dead_columns_are_rounded_not_lost(order: dict[str, bool]) -> None:
    weight, x = problem()
    x[:, [3, 100]] = 0
    solution = gptq(weight, hessian_of(x), 4, 64, **order)
    assert solution.dead_columns == 2
    off = (solution.weight.dequantize() - weight)[:, [3, 100]]
    assert off.norm() < 0.2 * weight[:, [3, 100]].norm()


def test_a_calibration_of_nothing_but_zeros_is_rounding() -> None:
    weight, _ = problem()
    solution = gptq(weight, hessian_of(torch.zeros(10, COLUMNS)), 4, 64)
    assert solution.dead_columns == COLUMNS
    assert torch.equal(solution.weight.codes, round_to_nearest(weight, 4, 64).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    weight, x = problem()
    x[7, 9] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        gptq(weight, hessian_of(x), 4, 64)


def test_damping_grows_until_it_helps() -> None:
    """Five tokens span five dimensions; float32 needs more than a billionth to see 256."""
    weight, x = problem(tokens=5)
    solution = gptq(weight, hessian_of(x), 4, 64, damp_percent=1e-9)
    assert 1e-9 < solution.damp_percent < 0.01
    assert bool(solution.weight.dequantize().isfinite().all())


def test_a_hessian_that_is_none_is_refused() -> None:
    weight, _ = problem()
    hessian = Hessian(COLUMNS)
    hessian.sum, hessian.tokens = torch.full((COLUMNS, COLUMNS), -1.0), 1
    with pytest.raises(CheckpointError, match=r"not positive definite, damping up to .* did not help"):
        gptq(weight, hessian, 4, 64)


def test_arguments_stay_as_they_were() -> None:
    weight, x = problem()
    hessian = hessian_of(x)
    before = weight.clone(), hessian.sum.clone()
    gptq(weight, hessian, 4, 64, desc_act=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian.sum, before[1])
