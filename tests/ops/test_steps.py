"""The steps of a native program, each against plain PyTorch: norm, gate, rotation, what a page holds, attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwenlet.ops import cpu, reference
from qwenlet.ops.cpu.program import Form, Program
from qwenlet.ops.packing import float_to_tiles
from qwenlet.ops.pages import TiledPages, tiled_layers

pytestmark = pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")
PAGE = 64
# Keys and values as they are kept: units in the last place of a number of the largest size.
KEPT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.int8: 0.5 / 127}


@pytest.fixture(params=cpu.available())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Whole:
    """A program of one step whose result goes through a linear of ones on the diagonal, in float32: out as it came."""

    def __init__(self, columns: int, rows: int) -> None:
        self.program, self.rows = Program(rows), rows
        weight = float_to_tiles(torch.eye(columns))
        self.inputs = self.program.inputs("here", Form.of(weight))
        self.output = torch.empty(rows, columns)
        self.weight = weight

    def run(self, isa: str) -> Tensor:
        self.program.linear("out", self.weight, None, self.inputs, None)
        none = torch.empty(self.rows, 1)
        wanted = torch.arange(self.rows)
        self.program.run(isa, [self.rows], [0], [[0]], none, none, None, wanted, self.output)
        return self.output


@pytest.mark.parametrize("columns", [16, 64, 2048, 5504])
def test_norm(isa: str, columns: int) -> None:
    x, weight = seeded(5, columns) * torch.tensor([1.0, 1e-4, 1e4, 0.0, 3.0])[:, None], seeded(columns, seed=1)
    step = Whole(columns, 5)
    step.program.norm(step.program._hold(x), weight, 1e-6, [step.inputs])
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    # a sum of squares of `columns` numbers in sixteen lanes, a root, three products
    bound = exact.abs() * (columns / 16 + 24) * 2.0**-24 + 1e-30
    assert ((step.run(isa).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("columns", [16, 5504])
def test_gate(isa: str, columns: int) -> None:
    up, gate = seeded(4, columns), seeded(4, columns, seed=1) * 30
    gate[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -87.5])
    step = Whole(columns, 4)
    step.program.swiglu(step.program._hold(up), step.program._hold(gate), [step.inputs])
    exact = up.double() * F.silu(gate.double())
    # the exponential is good to two units, and what lies below e^-87 may be taken for it
    bound = exact.abs() * 8 * 2.0**-24 + up.abs() * gate.abs() * 2e-38
    assert ((step.run(isa).double() - exact).abs() <= bound).all()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, H, D] with pairs (i, i + D / 2) turned."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def pages_of(count: int, heads: int, dim: int, dtype: torch.dtype) -> TiledPages:
    """The second of three layers, all of them zero."""
    layers = tiled_layers(3, count, heads, dim, dtype)
    for layer in layers:
        layer.memory.zero_()
    return layers[1]


def kept(tiles: TiledPages) -> tuple[Tensor, Tensor]:
    """Keys and values in float64, row by row."""
    pages = tiles.plain()
    k, v = pages.k.double(), pages.v.double()
    if pages.k_scales is None or pages.v_scales is None:
        return k, v
    return k * pages.k_scales[..., None].double(), v * pages.v_scales[..., None].double()


@pytest.mark.parametrize("dtype", list(KEPT), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 128), (6, 2, 64), (4, 1, 32), (1, 1, 256), (8, 4, 32)])
def test_rotation_pages_and_attention(isa: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Two rows in calls of several lengths, across the ends of pages, which lie in no order and in three runs."""
    tables, calls = [[4, 0, 17], [1, 12, 5]], [(1, 63), (70, 1), (1, 3), (17, 40)]
    pages = pages_of(18, kv_heads, dim, dtype)
    width, most = heads + 2 * kv_heads, max(map(sum, calls))
    program = Program(most)
    qkv, out = program.buffer(width, dim), program.buffer(heads * dim)
    codes, code_scales = program.buffer(heads, 2 * dim, dtype=torch.int8), program.buffer(heads, 2)
    program.attention(heads, pages, qkv, codes, code_scales, out)
    starts = [0, 0]
    for number, lengths in enumerate(calls):
        tokens = sum(lengths)
        given, angles = seeded(tokens, width, dim, seed=number), seeded(tokens, dim // 2, seed=9) * 3
        cos, sin, gain = angles.cos(), angles.sin(), seeded(tokens, seed=5).abs() + 0.5
        qkv[:tokens] = given
        nothing = torch.empty(0, dtype=torch.long)
        program.run(isa, list(lengths), starts, tables, cos, sin, gain, nothing, torch.empty(0, 1))
        q, k, v = given.split([heads, kv_heads, kv_heads], dim=1)
        q, k = turned(q.double(), cos.double(), sin.double()) * gain[:, None, None], turned(k, cos, sin)
        if dtype == torch.int8:
            whole, scales = reference.quantize_rows(q.float(), dim, reference.LEVELS[8])
            q = whole.double() * scales.double()
        at = 0
        k_kept, v_kept = kept(pages)
        for row, length in enumerate(lengths):
            past = starts[row]
            # [tokens so far, G, D]
            keys, values = (x[tables[row]].transpose(1, 2).flatten(0, 1)[: past + length] for x in (k_kept, v_kept))
            for stored, wanted in ((keys[past:], k[at : at + length]), (values[past:], v[at : at + length])):
                size = wanted.abs().amax(-1, keepdim=True)
                assert ((stored - wanted).abs() <= size * KEPT[dtype] * 1.001 + size * 2.0**-22).all()
            here = torch.arange(length)[:, None] + past >= torch.arange(past + length)
            spread = [x.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for x in (keys, values)]
            scores = q[at : at + length].transpose(0, 1) @ spread[0].mT / dim**0.5
            exact = scores.masked_fill(~here, -torch.inf).softmax(-1) @ spread[1]
            found = out[at : at + length].view(length, heads, dim).transpose(0, 1).double()
            # float32 sums of `dim` products in a score of at most some 40, whose error is the weight's; weights of int8
            # values are rounded to 1/16383 of their page's largest, and the largest of all pages sum to 1 at most
            bound = 40 * dim * 2.0**-24 + (PAGE * 0.5 / 16383 if dtype == torch.int8 else 0)
            assert (found - exact).abs().max() <= values.abs().max() * bound, (number, row)
            at += length
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]


def attended(isa: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, lengths: list[int]) -> Tensor:
    """What 150 tokens of one row attend to, [150, heads * dim], given in calls of so many."""
    pages, most = pages_of(3, kv_heads, dim, dtype), max(lengths)
    program, nothing = Program(most), torch.empty(0, dtype=torch.long)
    qkv, out = program.buffer(heads + 2 * kv_heads, dim), program.buffer(heads * dim)
    codes, code_scales = program.buffer(heads, 2 * dim, dtype=torch.int8), program.buffer(heads, 2)
    program.attention(heads, pages, qkv, codes, code_scales, out)
    given, angles = seeded(150, heads + 2 * kv_heads, dim), seeded(150, dim // 2, seed=9) * 3
    start, parts = 0, []
    for length in lengths:
        here = slice(start, start + length)
        qkv[:length] = given[here]
        cos, sin = angles[here].cos(), angles[here].sin()
        program.run(isa, [length], [start], [[2, 0, 1]], cos, sin, None, nothing, torch.empty(0, 1))
        parts.append(out[:length].clone())
        start += length
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", list(KEPT), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 128), (4, 2, 64), (2, 1, 32), (1, 1, 256), (2, 2, 16)])
def test_a_row_attends_to_the_same_bits_in_any_company(
    isa: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    """Blocks of one to sixteen rows have ways of their own through a page."""
    whole = attended(isa, heads, kv_heads, dim, dtype, [150])
    for lengths in ([1] * 150, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 31], [63, 2, 64, 21]):
        assert torch.equal(attended(isa, heads, kv_heads, dim, dtype, lengths), whole), lengths


@pytest.mark.parametrize("dim", [64, 128])
def test_all_sets_attend_to_the_same_bits(dim: int) -> None:
    """Plain C++ rounds twice where others round once."""
    found = {name: attended(name, 2, 2, dim, torch.int8, [150]) for name in cpu.available()}
    fused = [found[name] for name in found if name != "portable"]
    assert all(torch.equal(fused[0], other) for other in fused[1:])
    for other in fused[:1]:
        torch.testing.assert_close(found["portable"], other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_what_is_no_number_reaches_whoever_sees_it(isa: str, which: str, bad: float) -> None:
    """One number of a token's first head, in the first page or the second: not those before it, nor the other head."""
    pages, program = pages_of(2, 2, 128, torch.int8), Program(100)
    qkv, out = program.buffer(6, 128), program.buffer(2 * 128)
    program.attention(2, pages, qkv, program.buffer(2, 256, dtype=torch.int8), program.buffer(2, 2), out)
    one, nothing = torch.ones(100, 64), torch.empty(0, dtype=torch.long)
    for token in (40, 70):
        qkv[:] = seeded(100, 6, 128)
        qkv[token, {"query": 0, "key": 2, "value": 4}[which], 5] = bad
        program.run(isa, [100], [0], [[0, 1]], one, one * 0, None, nothing, torch.empty(0, 1))
        first, second = out.view(100, 2, 128).unbind(1)
        hit = ~first.isfinite().all(-1)
        assert hit[token]
        assert not hit[:token].any()
        assert hit[token + 1 :].all() == (which != "query")
        assert second.isfinite().all()
