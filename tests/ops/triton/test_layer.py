"""A whole layer of a decode step: as the modules compute it, and in how many launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenlet.cache import PagedPast, PagePool, Rows
from qwenlet.config import ModelConfig
from qwenlet.model import Block, Rotation
from qwenlet.ops.packing import to_tiles
from qwenlet.ops.rounding import round_to_nearest

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from qwenlet.ops.triton import attention
from qwenlet.ops.triton.attention import attend
from qwenlet.ops.triton.linear import Weight, linear_add, norm_linear, norm_swiglu, on_device
from qwenlet.ops.triton.scratch import Scratch

CONFIG = ModelConfig(
    model_type="qwen", vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, intermediate_size=96, max_position_embeddings=128, seq_length=128,
)  # fmt: skip


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched."""
    names: list[str] = []
    run = InterpretedFunction.run

    def counted(self: InterpretedFunction, *args: object, **named: object) -> object:
        names.append(self.fn.__name__)
        return run(self, *args, **named)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    monkeypatch.setattr(attention, "_PROGRAMS", 16)
    return names


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_five_launches(rows: int, bits: int, launches: list[str]) -> None:
    torch.manual_seed(1)
    block = Block(CONFIG, 0)
    for name, parameter in block.named_parameters():
        parameter.data = torch.randn(parameter.shape) * (0.2 if "ln" not in name else 1.0)

    def weight(linear: torch.nn.Linear) -> Weight:
        if bits == 32:
            return linear.weight.data
        codes = round_to_nearest(linear.weight.data, bits, 32)
        linear.weight.data = codes.dequantize()  # so that the module computes with the same
        return on_device(to_tiles(codes), "cpu")

    qkv_weight, out_weight = weight(block.attn.c_attn), weight(block.attn.c_proj)
    up, gate, down = weight(block.mlp.w1), weight(block.mlp.w2), weight(block.mlp.c_proj)
    positions = [70, 3, 64][:rows]
    layout = Rows(torch.tensor(positions), (1,) * rows, (1.0,) * rows)
    rotation = Rotation(CONFIG, layout, extend=True)
    pool = PagePool(CONFIG, 6, torch.float32, torch.device("cpu"))
    for table in (*pool.k, *pool.v):
        table.normal_()
    copies = pool.layer(0)
    ours = type(copies)(copies.k.clone(), copies.v.clone())
    tables = [[4, 1], [5, 0], [2, 3]][:rows]
    x = torch.randn(rows, 64)
    with torch.no_grad():
        wanted = block(x, rotation, PagedPast(pool, layout, tables, positions))

    def layer(x: Tensor, scratch: Scratch) -> Tensor:
        qkv = norm_linear(x, block.ln_1.weight.data, block.ln_1.eps, qkv_weight, block.attn.c_attn.bias.data,
                          scratch=scratch)  # fmt: skip
        answer = attend(qkv, rotation.cos[:, 0].contiguous(), rotation.sin[:, 0].contiguous(), None, ours,
                        torch.tensor(tables, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32),
                        heads=4, scratch=scratch)  # fmt: skip
        linear_add(answer, out_weight, x, scratch=scratch)
        gated = norm_swiglu(x, block.ln_2.weight.data, block.ln_2.eps, up, gate, scratch=scratch)
        return linear_add(gated, down, x, scratch=scratch)

    found = layer(x.clone(), Scratch("cpu", floats=1 << 18, counters=1 << 8))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert len(launches) == 5, launches
    assert (ours.v - pool.v[0]).abs().max() <= 1e-5
