"""Rows of the table, in Triton's interpreter, against the modules."""

from __future__ import annotations

import pytest
import torch

from qwenlet.linear import QuantEmbedding

pytest.importorskip("triton")

from qwenlet.ops.triton.embedding import embed

IDS = torch.tensor([5, 0, 39, -1, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats(dtype: torch.dtype) -> None:
    table = torch.randn(40, 1100).to(dtype)
    found = embed(IDS, table)
    assert torch.equal(found[[0, 1, 2, 4]], table[[5, 0, 39, 5]])
    assert not found[3].any()


@pytest.mark.parametrize("group", [32, 96])
def test_codes(group: int) -> None:
    codes = torch.randint(-127, 128, (40, 96), dtype=torch.int8)
    scales = torch.rand(40, 96 // group).half()
    wanted = QuantEmbedding(codes, scales, torch.bfloat16)(IDS.clamp(min=0))
    out = torch.empty(5, 96, dtype=torch.bfloat16)
    found = embed(IDS.int(), codes, scales, out=out)
    assert found is out
    assert torch.equal(found[[0, 1, 2, 4]], wanted[[0, 1, 2, 4]])
