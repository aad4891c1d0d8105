"""The one node of a linear with a low-rank part against the same in plain operators, and what is not computed twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora.tiny import plain_model, stir
from qwenlet import linear
from qwenlet.config import LoraConfig
from qwenlet.lora import add_lora, product, trainable
from qwenlet.lora.product import adapted
from qwenlet.model import Recompute
from qwenlet.ops import cpu, reference
from qwenlet.ops.packing import QuantTensor, to_tiles
from qwenlet.ops.rounding import round_to_nearest
from qwenlet.ops.triton import Status

SHARE, SCALE = 0.25, 0.7


def parts(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x, W, b, A, B."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((5, 12), (8, 12), (8,), (3, 12), (8, 3))
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def test_its_gradients_are_those_of_its_value() -> None:
    x, weight, bias, a, b = parts()
    for part in (x, a, b):
        part.requires_grad_()

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same entries are dropped each time
        return adapted(x, weight, bias, a, b, SCALE, SHARE)

    assert torch.autograd.gradcheck(run, (x, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_same_in_plain_operators(dtype: torch.dtype) -> None:
    x, weight, bias, a, b = parts(torch.float32)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    for part in (x, a, b):
        part.requires_grad_()
    torch.manual_seed(1)
    y = adapted(x, weight, bias, a, b, SCALE, SHARE)
    torch.manual_seed(1)
    keep = reference.kept(x.shape, int(torch.randint(1 << 62, ())), SHARE)
    expected = F.linear(x.float(), weight.float(), bias.float()) + SCALE * (x.float() * keep) @ a.T @ b.T
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(y, (x, a, b), grad.to(dtype))
    theirs = torch.autograd.grad(expected, (x, a, b), grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-4}
    torch.testing.assert_close(y.float(), expected, **tolerance)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), **tolerance)


def test_kept_products_give_the_same_step_and_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, dropout included, as if nothing or everything were computed again."""
    model = plain_model().train()
    add_lora(model, LoraConfig(rank=4, dropout=0.1))
    stir(model)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []

    class Counted:
        @staticmethod
        def linear(*args: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return F.linear(*args)

    monkeypatch.setattr(product, "F", Counted)
    steps, counts = {}, {}
    modes: tuple[Recompute, ...] = ("none", "products", "full")
    for mode in modes:
        model.transformer.recompute = mode
        model.zero_grad()
        calls.clear()
        torch.manual_seed(3)
        loss = model.loss(ids, ids)
        forward = len(calls)
        loss.backward()
        counts[mode] = (forward, len(calls) - forward)
        steps[mode] = [loss.detach(), *(p.grad.clone() for p in trainable(model).values() if p.grad is not None)]
    for mode in ("products", "full"):
        assert all(torch.equal(a, b) for a, b in zip(steps["none"], steps[mode], strict=True)), mode
    adapted_linears = 5 * len(model.transformer.h)
    assert counts["none"] == counts["products"] == (2 * adapted_linears, 0)
    assert counts["full"][1] > adapted_linears


# ------------------------------------------------------------------------------------------------------- its kernels


@pytest.mark.parametrize("isa", [*cpu.available(), "torch"])
@pytest.mark.parametrize(("rows", "outputs"), [(23, 160), (24, 160), (61, 144), (128, 1120), (1061, 96)])
@pytest.mark.parametrize("kind", ["int4", "int8", "zero points", "minimums", "act-order"])
def test_the_way_back_through_codes(
    kind: str, rows: int, outputs: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows go another way than many, and many of them in parts; so do outputs that fill no register, or more than
    a stretch. All are within the rounding of weights and gradients to bfloat16."""
    monkeypatch.setenv("QWENLET_ISA", isa)
    torch.manual_seed(4)
    weight = torch.randn(outputs, 352)
    plain = round_to_nearest(weight, 8 if kind == "int8" else 4, 32, sym=kind in ("int4", "int8"))
    minimums = torch.randn(outputs, 11).half() if kind == "minimums" else None
    order = torch.randperm(352) if kind == "act-order" else None
    zeros = None if kind == "minimums" else plain.zeros
    codes = QuantTensor(plain.bits, 32, plain.codes, plain.scales, zeros, minimums=minimums, order=order)
    grad, exact = torch.randn(rows, outputs), codes.dequantize()
    for dtype in (torch.float32, torch.bfloat16):
        out = cpu.linear_back(grad.to(dtype), to_tiles(codes))
        assert out.dtype == dtype
        bound = 3 * 2**-8 * (grad.abs() @ exact.abs())
        assert ((out.float() - grad @ exact).abs() <= bound).all()


@pytest.mark.parametrize("by_triton", [False, True])
@pytest.mark.parametrize("kind", ["int4", "int8", "act-order"])
def test_beside_codes_on_a_gpu(kind: str, by_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs there, here on a CPU: products, gradients and a low-rank part beside codes that become floats some
    outputs at a time."""
    monkeypatch.setattr(linear, "_on_gpu", lambda _: True)
    monkeypatch.setattr(linear, "_PIECE_ROWS", 32)
    monkeypatch.setattr(linear.triton, "status", lambda: Status(by_triton, ""))
    torch.manual_seed(7)
    rounded = round_to_nearest(torch.randn(72, 64), 8 if kind == "int8" else 4, 32)
    order = torch.randperm(64) if kind == "act-order" else None
    codes = QuantTensor(rounded.bits, 32, rounded.codes, rounded.scales, order=order)
    tiles, exact, bias = linear.on_device(to_tiles(codes), torch.device("cpu")), codes.dequantize(), torch.randn(72)
    x, grad = torch.randn(5, 64), torch.randn(5, 72)
    torch.testing.assert_close(linear.product(x, tiles, bias), F.linear(x, exact, bias), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.tiles_back(grad, tiles), grad @ exact, rtol=1e-5, atol=1e-4)
    a, b = torch.randn(3, 64), torch.randn(72, 3)
    for part in (x, a, b):
        part.requires_grad_()
    ours = torch.autograd.grad(adapted(x, tiles, bias, a, b, SCALE), (x, a, b), grad)
    theirs = torch.autograd.grad(F.linear(x, exact, bias) + SCALE * x @ a.T @ b.T, (x, a, b), grad)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("isa", [*cpu.available(), "torch"])
@pytest.mark.parametrize("shape", [(144, 352), (320, 80), (16, 16), (48, 272)])
def test_the_way_back_through_bfloat16_rows(shape: tuple[int, int], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLET_ISA", isa)
    torch.manual_seed(5)
    weight, grad = torch.randn(shape).bfloat16(), torch.randn(37, shape[0]).bfloat16()
    exact = grad.double() @ weight.double()
    out = cpu.rows_back(grad, weight)
    assert out.dtype == torch.bfloat16
    # float32 sums, rounded once
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("isa", [*cpu.available(), "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_is_its_definition(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLET_ISA", isa)
    x, onto = torch.randn(7, 119).to(dtype), torch.randn(7, 119).to(dtype)
    keep = reference.kept(x.shape, (11 << 40) + 5, 0.3)
    left = torch.where(keep, x, 0.0)
    assert torch.equal(cpu.drop(x, (11 << 40) + 5, 0.3), left)
    assert torch.equal(cpu.drop(x, (11 << 40) + 5, 0.3, onto.clone()), onto + left)


def test_dropout_drops_its_share_and_no_seed_drops_as_another() -> None:
    shape = (400, 1000)
    one, two = (reference.kept(shape, seed, 0.05) for seed in (1, 2))
    for keep in (one, two):
        assert abs(float((~keep).float().mean()) - 0.05) < 5 * (0.05 * 0.95 / 400_000) ** 0.5
    both = float((~one & ~two).float().mean())  # independent: 0.05 squared
    assert abs(both - 0.0025) < 5 * (0.0025 / 400_000) ** 0.5
    beside = float((~one[:, 1:] & ~one[:, :-1]).float().mean())
    assert abs(beside - 0.0025) < 5 * (0.0025 / 400_000) ** 0.5
