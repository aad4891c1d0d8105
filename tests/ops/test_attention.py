"""Which kernel answers, and which mask a row that goes on gets; that they agree is tested with the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from qwenlet.ops import attention
from qwenlet.ops.attention import attention_backend, causal_attention, check_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize(("new", "keys"), [(1, 5), (3, 5), (5, 5), (7, 200)])
def test_the_gpus_mask_is_the_cpus(new: int, keys: int) -> None:
    """A GPU's flash kernel takes no tensor for a mask, but this."""
    mask = causal_lower_right(new, keys)
    assert torch.equal(mask._materialize(CPU), attention._lower_right(new, keys, CPU))
    q, k, v = torch.randn(3, 1, 2, keys, 16)
    q = q[:, :, :new]
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = causal_attention(*(x[0].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)[None]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "grad", "there", "by_package"),
    [
        ("auto", torch.bfloat16, 128, False, True, True),
        ("flash", torch.float16, 64, False, True, True),
        ("sdpa", torch.bfloat16, 128, False, True, False),
        ("math", torch.bfloat16, 128, False, True, False),
        ("flash", torch.float32, 128, False, True, False),
        ("flash", torch.bfloat16, 512, False, True, False),
        ("auto", torch.bfloat16, 128, True, True, False),
        ("auto", torch.bfloat16, 128, False, False, False),
    ],
)
def test_when_the_flash_attn_package_answers(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: Any, dim: int, grad: bool, there: bool, by_package: bool
) -> None:
    monkeypatch.setattr(attention, "flash_package", lambda: len if there else None)
    query: Any = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 2, 3, dim), requires_grad=grad)
    with attention_backend(name):
        assert attention._by_package(query) is by_package
    assert attention._by_package(SimpleNamespace(is_cuda=False)) is False  # type: ignore[arg-type]


def test_the_choice_ends_with_its_block() -> None:
    with attention_backend("sdpa"), attention_backend("math"):
        assert attention._asked.get() == "math"
    assert attention._asked.get() == "auto"


@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "math"])
def test_what_runs_on_a_cpu(name: str) -> None:
    check_backend(name, CPU, torch.float32)
