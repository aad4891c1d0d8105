"""On a GPU: recorded steps, whole engines against the modules, weights that arrive in codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qwenlet
from qwenlet.config import SamplingParams
from qwenlet.ops import triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.skipif(triton.interpreted(), reason="kernels are interpreted in this process"),
]


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"quant": "int4"}, {"quant": "int8"}])
def test_kernels_and_torch_write_the_same(golden: Path, options: dict[str, str]) -> None:
    replies = []
    for decode in ("kernels", "torch"):
        with qwenlet.load(str(golden / "tiny-qwen"), device="cuda", decode=decode, **options) as llm:  # type: ignore[arg-type]
            params = SamplingParams(temperature=0.0, max_new_tokens=24, ignore_eos=True)
            replies.append([one.token_ids for one in llm.generate([[1, 2, 3], [9] * 70, [4]], params)])
    alike = sum(a == b for one, two in zip(*replies, strict=True) for a, b in zip(one, two, strict=True))
    assert alike >= 60 if "quant" in options or options.get("dtype") == "bf16" else replies[0] == replies[1]


@pytest.mark.parametrize("chunk", [64, 2048])
@pytest.mark.parametrize("attention", ["flash", "sdpa", "math"])
def test_a_prompt_in_pieces(golden: Path, attention: str, chunk: int) -> None:
    """`flash` refused a prompt that goes on, as it came with a mask."""
    with qwenlet.load(
        str(golden / "tiny-qwen"), device="cuda", dtype="bf16", attention=attention, prefill_chunk=chunk
    ) as llm:
        completion = llm.generate([5] * 200, SamplingParams(temperature=0.0, max_new_tokens=3))
    assert completion.finish_reason in ("stop", "length")
