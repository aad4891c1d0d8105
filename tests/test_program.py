"""The recorded program against the modules it was recorded from, and a row's result as its own, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qwenlet.cache import PagedPast, PagePool, Rows, pages_for
from qwenlet.config import ModelConfig
from qwenlet.linear import QuantLinear, TiledLinear, replace_linear
from qwenlet.model import Qwen
from qwenlet.ops import cpu
from qwenlet.ops.packing import to_tiles
from qwenlet.ops.pages import untile
from qwenlet.ops.rounding import round_to_nearest
from qwenlet.program import QwenProgram, obstacle

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")


@pytest.fixture(params=cpu.available())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QWENLET_ISA", request.param)
    return str(request.param)


def swapped(bits: int, **changes: object) -> Qwen:
    """A random model whose linears are the kernels': rounded to 4 or 8 bits, or bfloat16 tiles."""
    fields: dict[str, object] = {
        "model_type": "qwen", "vocab_size": 203, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 192, "max_position_embeddings": 512,
        "seq_length": 64, "use_dynamic_ntk": True, "use_logn_attn": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen(ModelConfig(**(fields | changes))).eval().requires_grad_(False)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "ln_" in name else 0.0, std=0.1)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if bits == 16:
                replace_linear(model, name, TiledLinear(module.weight.bfloat16(), module.bias))
            else:
                tiles = to_tiles(round_to_nearest(module.weight, bits, 64))
                replace_linear(model, name, QuantLinear(tiles, module.bias))
    return model


def native(
    model: Qwen, dtype: torch.dtype, rows: Sequence[Sequence[int]], pieces: Sequence[int], alpha: float = 1.0
) -> list[Tensor]:
    """Logits of every position of each row, all rows going on piece by piece side by side, over pages in disorder."""
    pool = PagePool(model.config, 24, dtype, CPU, tiled=True)
    spare = pool.take(3)
    tables = [pool.take(pages_for(len(ids))) for ids in rows]
    pool.give_back(spare)
    program = QwenProgram(model, pool, 512)
    out: list[list[Tensor]] = [[] for _ in rows]
    start = 0
    with torch.inference_mode():
        for length in pieces:
            parts = [ids[start : start + length] for ids in rows]
            live = [i for i, part in enumerate(parts) if part]
            lengths = [len(parts[i]) for i in live]
            positions = torch.cat([torch.arange(start, start + n) for n in lengths])
            logits = program.forward(
                torch.tensor([token for i in live for token in parts[i]]),
                Rows(positions, tuple(lengths), (alpha,) * len(live)),
                [tables[i] for i in live],
                [start] * len(live),
                torch.arange(sum(lengths)),
            )
            for i, piece in zip(live, logits.split(lengths), strict=True):
                out[i].append(piece)
            start += length
    return [torch.cat(pieces) for pieces in out]


def by_modules(model: Qwen, dtype: torch.dtype, ids: Sequence[int], alpha: float = 1.0) -> Tensor:
    pool = PagePool(model.config, 8, dtype, CPU)
    rows = Rows.single(0, len(ids), alpha)
    past = PagedPast(pool, rows, [list(range(pages_for(len(ids))))], [0])
    with torch.inference_mode():
        return model(torch.tensor(ids), rows, past)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 203, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 17, 64, 65, 200])
def test_the_program_computes_what_the_modules_compute(isa: str, bits: int, count: int) -> None:
    """Not to the bit: norms and sums round otherwise, and a number at the edge between two codes falls to the other.
    200 tokens are beyond the training length: log-n attention and an NTK factor act."""
    model, ids = swapped(bits), tokens(count)
    alpha = model.config.ntk_alpha(count)
    found, expected = native(model, torch.int8, [ids], [count], alpha)[0], by_modules(model, torch.int8, ids, alpha)
    error = (found - expected).abs()
    spread = expected.std()
    assert error.mean() <= (0.025 if bits == 4 else 0.006) * spread, float(error.mean() / spread)
    assert error.max() <= 0.15 * spread, float(error.max() / spread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_caches(isa: str, dtype: torch.dtype) -> None:
    model, ids = swapped(8), tokens(100)
    found = native(model, dtype, [ids], [100])[0]
    expected = by_modules(model, torch.float32, ids)
    assert (found - expected).abs().max() <= 0.05 * expected.std()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_pieces_give_the_same_bits_as_the_whole(isa: str, bits: int, dtype: torch.dtype) -> None:
    model, ids = swapped(bits), tokens(150)
    whole = native(model, dtype, [ids], [150])[0]
    assert torch.equal(native(model, dtype, [ids], [1, 2, 3, 5, 17, 64, 58])[0], whole)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rows_side_by_side_give_the_same_bits_as_alone(isa: str, bits: int) -> None:
    model = swapped(bits, num_key_value_heads=2)
    rows = [tokens(70, 1), tokens(3, 2), tokens(131, 3), tokens(64, 4)]
    together = native(model, torch.int8, rows, [2, 60, 1, 70])
    for ids, logits in zip(rows, together, strict=True):
        assert torch.equal(logits, native(model, torch.int8, [ids], [len(ids)])[0])


def test_threads_do_not_change_a_bit() -> None:
    model, ids = swapped(4), tokens(90)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(native(model, torch.int8, [ids], [80, 1, 9])[0])
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_keys_come_back_out_of_their_tiles() -> None:
    model, ids = swapped(16), tokens(70)
    pool = PagePool(model.config, 2, torch.int8, CPU, tiled=True)
    program = QwenProgram(model, pool, 128)
    with torch.inference_mode():
        program.forward(torch.tensor(ids), Rows.single(0, 70, 1.0), [[0, 1]], [0], torch.tensor([69]))
    plain = PagePool(model.config, 2, torch.int8, CPU)
    with torch.inference_mode():
        past = PagedPast(plain, Rows.single(0, 70, 1.0), [[0, 1]], [0])
        model(torch.tensor(ids), Rows.single(0, 70, 1.0), past)
    for page, slots in ((0, 64), (1, 6)):
        found, expected = untile(pool.k[0])[page, :, :slots], plain.k[0][page, :, :slots]
        assert (found.int() - expected.int()).abs().max() <= 1
        assert (pool.v[0][page, :, :slots].int() - plain.v[0][page, :, :slots].int()).abs().max() <= 1


def test_what_can_not_be_a_program_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped(4)
    assert obstacle(model, torch.int8) is None
    assert "float32 cache" in str(obstacle(model, torch.float32))
    assert "heads of 16" in str(obstacle(swapped(4, head_dim=16, num_attention_heads=8), torch.int8))
    plain = nn.Linear(128, 203, bias=False)
    replace_linear(model, "lm_head", plain)
    assert obstacle(model, torch.int8) == "lm_head is a linear of torch's"
    monkeypatch.setenv("QWENLET_ISA", "torch")
    assert obstacle(swapped(4), torch.int8) == "QWENLET_ISA=torch"
