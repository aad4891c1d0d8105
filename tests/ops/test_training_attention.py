"""Training's attention: torch's in double precision is the measure, forward and back, for every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenlet.cache import NoPast, Rows
from qwenlet.ops import cpu
from qwenlet.ops.attention import attention_backend, causal_attention
from qwenlet.ops.training_attention import attend_rows, takes

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the package was built without kernels")

# query heads, heads of keys, numbers of a head
SHAPES = [(9, 3, 64), (4, 4, 128), (2, 1, 32), (2, 2, 16), (3, 1, 48), (1, 1, 80)]
# rows that end before, on and behind a block of 64 keys, of 48 queries, a register of 16
LENGTHS = [1, 5, 15, 16, 17, 47, 48, 49, 63, 64, 65, 97, 130]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([causal_attention(*row) for row in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])


def both(
    shape: tuple[int, int, int], lengths: list[int], dtype: torch.dtype, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(result, gradient of q, k and v together) by the kernels, and the same in double precision."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    grad = torch.randn(sum(lengths), heads, dim, generator=generator).to(dtype)

    def run(x: Tensor, grad: Tensor, attend) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x.requires_grad_()
        out = attend(*x.split((heads, kv_heads, kv_heads), 1), lengths)
        out.backward(grad)
        assert x.grad is not None
        return out.detach(), x.grad

    return run(qkv.clone(), grad, attend_rows), run(qkv.double(), grad.double(), one_by_one)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


FAST = [isa for isa in cpu.available() if isa != "portable"]


@pytest.mark.parametrize("isa", cpu.available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradient_are_attentions(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32: some hundred roundings of 6e-8. bfloat16: its own rounding, once in the result, which the way back
    starts from, and once in the gradient."""
    monkeypatch.setenv("QWENLET_ISA", isa)
    (out, back), (whole, gradient) = both(shape, LENGTHS, dtype)
    assert out.dtype == back.dtype == dtype
    bound = 4e-6 if dtype == torch.float32 else 2**-7
    assert off(out, whole) < bound
    assert off(back, gradient) < bound


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=5), st.sampled_from(SHAPES), st.integers(0, 99),
    st.sampled_from(cpu.available() or ["torch"]),
)  # fmt: skip
def test_any_rows_and_heads(lengths: list[int], shape: tuple[int, int, int], seed: int, isa: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENLET_ISA", isa)
        (out, back), (whole, gradient) = both(shape, lengths, torch.float32, seed)
    assert off(out, whole) < 4e-6
    assert off(back, gradient) < 4e-6


def test_a_row_is_the_same_bits_in_any_company() -> None:
    heads, dim, lengths = 3, 64, [70, 33, 129]
    q, k, v = torch.randn(3, sum(lengths), heads, dim, generator=torch.Generator().manual_seed(1))
    whole = attend_rows(q, k, v, lengths).split(lengths)
    for number, rows in enumerate(zip(*(x.split(lengths) for x in (q, k, v)), strict=True)):
        assert torch.equal(attend_rows(*rows, [lengths[number]]), whole[number])


def test_huge_scores_stay_finite() -> None:
    """A softmax of one key: all the others are e^-hundreds."""
    q = torch.full((80, 1, 16), 40.0)
    k, v = torch.randn(2, 80, 1, 16, generator=torch.Generator().manual_seed(0))
    k[7] = 50.0
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = attend_rows(q, k, v, [80])
    assert torch.allclose(out[7:], v[7].expand(73, 1, 16))
    out.sum().backward()
    assert all(bool(x.grad is not None and x.grad.isfinite().all()) for x in (q, k, v))


@pytest.mark.skipif(not FAST, reason="plain C++ is left to torch")
def test_rows_that_training_gives_away_go_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gradient wanted alone, and not for whoever names another kernel; the result is the same."""
    lengths = [40, 24, 64]
    q, k, v = torch.randn(3, sum(lengths), 4, 32, generator=torch.Generator().manual_seed(0))
    rows = NoPast(Rows.fresh(lengths, [1.0] * 3))
    asked: list[int] = []

    def counted(*arguments) -> Tensor:  # type: ignore[no-untyped-def]
        asked.append(1)
        return attend_rows(*arguments)

    monkeypatch.setattr("qwenlet.ops.training_attention.attend_rows", counted)
    plain = rows.attend(0, q, k, v)
    wanted = rows.attend(0, q.requires_grad_(), k, v)
    assert asked == [1]
    assert torch.allclose(plain, wanted, atol=1e-5)
    with torch.no_grad():
        rows.attend(0, q, k, v)
    with attention_backend("sdpa"):
        rows.attend(0, q, k, v)
    assert asked == [1]


@pytest.mark.skipif(not FAST, reason="plain C++ is left to torch")
def test_what_it_leaves_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.zeros(64, 4, 32), torch.zeros(64, 2, 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert takes(q, k, [32, 32])
    assert not takes(q, k, [64]), "two heads of keys for four threads"
    assert not takes(q.half(), k.half(), [32, 32])
    assert not takes(torch.zeros(64, 4, 40), torch.zeros(64, 2, 40), [32, 32])
    assert not takes(q.to("meta"), k.to("meta"), [32, 32])
    for slower in ("portable", "torch"):
        monkeypatch.setenv("QWENLET_ISA", slower)
        assert not takes(q, k, [32, 32])
