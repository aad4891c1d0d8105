"""Linears over weights in tiles: every kernel against the plain definition, on every instruction set there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qwenlet.ops import cpu, reference
from qwenlet.ops.packing import QuantTensor, Tiles, float_to_tiles, to_tiles

ROWS = (1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 512)
WIDTHS = (64, 640, 2048, 5504)
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")


@pytest.fixture(params=cpu.available() or [None])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QWENLET_ISA", request.param or "torch")
    return str(request.param)


def weight(bits: int, group: int, kind: str, rows: int, columns: int, *, act_order: bool = False) -> QuantTensor:
    draw = torch.Generator().manual_seed(bits * group + columns)
    groups = columns // group
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = (torch.rand(rows, groups, generator=draw) * 0.02 + 0.001).half()
    highest = min(1 << bits, 255)
    points = torch.randint(1, highest + 1, (rows, groups), generator=draw).to(torch.uint8)
    lows = (-torch.rand(rows, groups, generator=draw) * 0.1).half()
    return QuantTensor(
        bits,
        group,
        codes,
        scales,
        points if kind == "points" else None,
        lows if kind == "minimums" else None,
        torch.randperm(columns, generator=draw) if act_order else None,
    )


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def exact(x: Tensor, w: QuantTensor) -> tuple[Tensor, Tensor]:
    """What `reference.linear_int` defines, in float64, and how far float32 sums may be from it.

    Each group adds a product of three float32 numbers (three roundings) and a sum (one more), and a minimum as much
    again: 8 roundings of 2^-24 a group, of at most the sum of magnitudes so far.
    """
    if w.order is not None:
        x = x[:, w.order]
    codes, scales = reference.quantize_rows(x, w.group_size, reference.LEVELS[w.bits])
    groups = w.shape[1] // w.group_size
    a = codes.unflatten(-1, (groups, -1)).double()
    raw = w.codes.unflatten(-1, (groups, -1)).double()
    zero = float(1 << (w.bits - 1)) if w.zeros is None else w.zeros.double()[..., None]
    dots = torch.einsum("mgk,ngk->mng", a, raw - (0 if w.minimums is not None else zero))
    terms = dots * w.scales.double() * scales.double()[:, None]
    magnitude = terms.abs().sum(-1)
    total = terms.sum(-1)
    if w.minimums is not None:
        lows = (a.sum(-1) * scales.double())[:, None] * w.minimums.double()
        total, magnitude = total + lows.sum(-1), magnitude + lows.abs().sum(-1)
    return total, magnitude * (8 * groups + 8) * 2.0**-24


@needs_kernels
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_kernel_is_within_rounding_of_the_definition(isa: str, bits: int, columns: int) -> None:
    x = torch.randn(512, columns, generator=torch.Generator().manual_seed(1))
    x[2] = 0.0  # a row without a scale
    x[:, 5] *= 30.0  # the outliers that real activations have
    bias = torch.randn(40)
    # all heights on all widths, and every combination of groups with most of them
    rows = ROWS if columns <= 640 else (1, 3, 17)
    if columns > 640:
        tall = to_tiles(weight(bits, 128, "middle", 40, columns))
        everything = cpu.linear_quant(x, tall, bias)
        assert all(torch.equal(cpu.linear_quant(x[:count], tall, bias), everything[:count]) for count in ROWS)
    groups = [group for group in (32, 64, 128) if columns % group == 0]
    for group, kind, act_order in itertools.product(groups, ("middle", "points", "minimums"), (False, True)):
        w = weight(bits, group, kind, 40, columns, act_order=act_order)  # 40 outputs: the last tile is half empty
        tiles = to_tiles(w)
        most = rows[-1]
        want, bound = exact(x[:most], w)
        everything = cpu.linear_quant(x[:most], tiles, bias)
        error = (everything.double() - want - bias.double()).abs()
        assert (error <= bound + bias.abs() * 2.0**-23).all(), (group, kind, act_order)
        for count in rows:
            some = cpu.linear_quant(x[:count], tiles, bias)
            assert torch.equal(some, everything[:count]), f"{count} rows differ: {group} {kind} {act_order}"


@needs_kernels
@pytest.mark.parametrize("group", [32, 64])
def test_one_group_alone(isa: str, group: int) -> None:
    w = weight(4, group, "middle", 16, group)
    x = torch.randn(3, group)
    want, bound = exact(x, w)
    assert ((cpu.linear_quant(x, to_tiles(w), None).double() - want).abs() <= bound).all()


@needs_kernels
def test_eight_bit_extremes_do_not_overflow(isa: str) -> None:
    """All codes 255 against all activations at their largest, which saturates 16-bit sums of pairs."""
    ones = torch.full((16, 128), 255, dtype=torch.uint8)
    w = QuantTensor(8, 128, ones, torch.ones(16, 1).half())
    for rows in (1, 4, 16, 40):
        y = cpu.linear_quant(torch.ones(rows, 128), to_tiles(w), None)
        torch.testing.assert_close(y, torch.full((rows, 16), 127.0 * 128), rtol=1e-6, atol=0)


@needs_kernels
@pytest.mark.parametrize("rows", [4, 7, 12, 20, 150])  # a block in part, whole ones, more than one pass of AMX
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["middle", "points", "minimums"])
def test_all_sets_agree_to_the_bit_on_quantized_weights(
    monkeypatch: pytest.MonkeyPatch, kind: str, bits: int, group: int, rows: int
) -> None:
    """Whole-number sums and fused multiply-adds in one order; plain C++ rounds twice where others round once."""
    w, x = weight(bits, group, kind, 117, 640), seeded(rows, 640)
    all_sets_agree(x, to_tiles(w), exact(x, w)[1], monkeypatch)


@needs_kernels
@pytest.mark.parametrize(("columns", "group", "rows"), [(1 << 15, 64, 40), (1 << 16, 32, 130), (1 << 18, 32, 20)])
def test_widths_beyond_scratch(monkeypatch: pytest.MonkeyPatch, columns: int, group: int, rows: int) -> None:
    """Where not all lines fit unpacked, not the tables of all rows, and not those of sixteen."""
    x = seeded(rows, columns)
    for bits in (4, 8):
        w = weight(bits, group, "middle", 64, columns)
        all_sets_agree(x, to_tiles(w), exact(x, w)[1], monkeypatch)


@needs_kernels
def test_all_sets_agree_to_the_bit_on_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = seeded(20, 650), seeded(117, 650)
    # a product and a sum for each column, rounded apart
    all_sets_agree(x, float_to_tiles(w), x.abs().double() @ w.abs().double().T * 650 * 2.0**-23, monkeypatch)


def all_sets_agree(x: Tensor, w: Tiles, bound: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, but for plain C++: it and the others may each be `bound` from the definition."""
    results = {}
    for name in cpu.available():
        monkeypatch.setenv("QWENLET_ISA", name)
        results[name] = cpu.linear_tiles(x, w, None)
    fused = [results[name] for name in results if name != "portable"]
    assert all(torch.equal(fused[0], other) for other in fused[1:])
    if fused:
        assert ((results["portable"].double() - fused[0].double()).abs() <= 2 * bound).all()


@needs_kernels
@pytest.mark.parametrize("columns", [64, 640, 2048])
def test_bfloat16_tiles(isa: str, columns: int) -> None:
    draw = torch.Generator().manual_seed(3)
    plain = torch.randn(40, columns, generator=draw).bfloat16()
    x = torch.randn(512, columns, generator=draw)
    bias = torch.randn(40, generator=draw)
    tiles = float_to_tiles(plain)
    rounded = x.bfloat16().double()
    want = rounded @ plain.double().T + bias.double()
    # sums of `columns` products, one rounding each, in at worst one chain
    bound = (rounded.abs() @ plain.double().abs().T + bias.abs()) * columns * 2.0**-24
    everything = cpu.linear_tiles(x, tiles, bias)
    assert ((everything.double() - want).abs() <= bound).all()
    for count in ROWS:
        assert torch.equal(cpu.linear_tiles(x[:count], tiles, bias), everything[:count])


@needs_kernels
@pytest.mark.parametrize("columns", [1, 7, 64, 65, 640, 2048])
def test_float32_tiles(isa: str, columns: int) -> None:
    draw = torch.Generator().manual_seed(4)
    plain = torch.randn(117, columns, generator=draw)  # 8 tiles, the last one partly empty
    x = torch.randn(512, columns, generator=draw)
    bias = torch.randn(117, generator=draw)
    tiles = float_to_tiles(plain)
    want = x.double() @ plain.double().T + bias.double()
    # a product goes through a chain of at most 64 sums, then one of a sum for each 64 columns; and the bias
    roundings = 1 + 64 + -(-columns // 64) + 1
    bound = (x.double().abs() @ plain.double().abs().T + bias.abs()) * (roundings + 1) * 2.0**-24
    everything = cpu.linear_tiles(x, tiles, bias)
    assert ((everything.double() - want).abs() <= bound).all()
    for count in ROWS:
        assert torch.equal(cpu.linear_tiles(x[:count], tiles, bias), everything[:count])
        assert torch.equal(cpu.linear_tiles(x[512 - count :], tiles, bias), everything[512 - count :])


@needs_kernels
def test_the_outputs_of_a_float32_linear_do_not_depend_on_each_other(isa: str) -> None:
    """However many tiles stand side by side: a slice of the weight gives that slice of the result."""
    plain, x = torch.randn(117, 200), torch.randn(20, 200)
    everything = cpu.linear_tiles(x, float_to_tiles(plain), None)
    for first, last in ((0, 16), (16, 64), (32, 117), (112, 117)):
        some = cpu.linear_tiles(x, float_to_tiles(plain[first:last]), None)
        assert torch.equal(some, everything[:, first:last])


@needs_kernels
def test_what_is_no_number_stays_in_its_row(isa: str) -> None:
    plain, x = torch.randn(40, 96), torch.randn(12, 96)
    whole = cpu.linear_tiles(x, float_to_tiles(plain), None)
    x[3, 5], x[8, 70] = torch.nan, torch.inf
    found = cpu.linear_tiles(x, float_to_tiles(plain), None)
    assert found[3].isnan().all()
    assert not found[8].isfinite().any()
    others = [r for r in range(12) if r not in (3, 8)]
    assert torch.equal(found[others], whole[others])


@needs_kernels
@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["middle", "points", "minimums"])
def test_what_is_no_number_is_not_rounded_away(isa: str, kind: str, bits: int, rows: int) -> None:
    w = weight(bits, 64, kind, 40, 192)
    x = torch.randn(rows, 192)
    whole = cpu.linear_quant(x, to_tiles(w), None)
    for value in (torch.nan, torch.inf, -torch.inf):
        for column in (0, 77, 191):
            wild = x.clone()
            wild[-1, column] = value
            found = cpu.linear_quant(wild, to_tiles(w), None)
            assert found[-1].isnan().all()
            assert torch.equal(found[:-1], whole[:-1])
            assert reference.linear_int(wild, w)[-1].isnan().all()


@needs_kernels
def test_more_rows_than_a_call_takes(isa: str) -> None:
    w = to_tiles(weight(4, 64, "middle", 16, 64))
    x = torch.randn(2100, 64)
    y = cpu.linear_quant(x, w, None)
    assert torch.equal(y[2099:], cpu.linear_quant(x[2099:], w, None))


def test_without_kernels_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLET_ISA", "torch")
    w, x = weight(4, 32, "minimums", 24, 96), torch.randn(5, 96)
    assert torch.equal(cpu.linear_quant(x, to_tiles(w), None), reference.linear_int(x, w))


def test_no_rows_give_no_rows() -> None:
    tiles: Tiles = to_tiles(weight(8, 32, "middle", 24, 96))
    assert cpu.linear_quant(torch.empty(0, 96), tiles, None).shape == (0, 24)


@needs_kernels
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 16), (7, 40), (256, 2048), (5, 151)])
def test_words_move_to_lines(count: int, columns: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (count, columns), dtype=torch.int32)
    lines = cpu.words_to_lines(words)
    assert torch.equal(lines.transpose(1, 2).flatten(0, 1)[:columns].T, words)
    assert not lines.transpose(1, 2).flatten(0, 1)[columns:].any(), "padding is zero"
