"""The recorded program against the modules it was recorded from, in float32 against the published code too, and a row's
result as its own, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qwenlet.cache import PagedPast, PagePool, Rows, pages_for
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.linear import QuantLinear, TiledLinear, replace_linear
from qwenlet.model import Qwen, Rotation
from qwenlet.ops import cpu
from qwenlet.ops.packing import to_tiles
from qwenlet.ops.rounding import round_to_nearest
from qwenlet.program import Angles, QwenProgram, obstacle
from random_qwen import random_qwen

CPU = torch.device("cpu")
FLOATS = {16: torch.bfloat16, 32: torch.float32}
# bits of the weights and the cache's dtype
KINDS = [(4, torch.int8), (8, torch.int8), (16, torch.int8), (16, torch.bfloat16), (32, torch.float32)]
pytestmark = pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")


@pytest.fixture(params=cpu.available())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QWENLET_ISA", request.param)
    return str(request.param)


def random_model(**changes: object) -> Qwen:
    sizes: dict[str, object] = {
        "vocab_size": 203, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
        "intermediate_size": 192,
    }  # fmt: skip
    return random_qwen(0.1, **(sizes | changes))


def swapped(bits: int, **changes: object) -> Qwen:
    """The same with the kernels' linears: rounded to 4 or 8 bits, or floats of 16 or 32 in tiles."""
    model = random_model(**changes)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if bits in FLOATS:
                replace_linear(model, name, TiledLinear(module.weight.to(FLOATS[bits]), module.bias))
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


@pytest.mark.parametrize("shape", [{}, {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 2}])
@pytest.mark.parametrize("count", [1, 2, 17, 64, 65, 200])
def test_in_float32_it_computes_what_torch_computes(isa: str, count: int, shape: dict[str, int]) -> None:
    """Both round to float32, in orders of their own: some 100 roundings of 2^-24 in a row of two layers (sums of up to
    192 numbers, norms, softmax) stay below 100 * 2^-24 = 6e-6 of the largest numbers."""
    model, ids = random_model(**shape), tokens(count)
    alpha = model.config.ntk_alpha(count)
    expected = by_modules(model, torch.float32, ids, alpha)
    found = native(swapped(32, **shape), torch.float32, [ids], [count], alpha)[0]
    assert (found - expected).abs().max() <= 6e-6 * expected.abs().max()


@pytest.mark.parametrize("pieces", [[128], [64, 64], [1, 127], [63, 2, 63], [128 - 40] + [1] * 40])
def test_in_float32_it_computes_what_the_published_code_computes(isa: str, golden: Path, pieces: list[int]) -> None:
    """At four times the training length. The published code is itself 2.6e-5 from the same maths in float64, and the
    program no further (2.8e-5)."""
    reference = load_file(golden / "tiny-qwen" / "golden.safetensors")
    model, _ = load_model(Checkpoint.open(golden / "tiny-qwen"), torch.float32, CPU, linear="tiled")
    ids = reference["prefill.128.input_ids"][0].tolist()
    found = native(model, torch.float32, [ids], pieces, model.config.ntk_alpha(128))[0]
    assert (found - reference["prefill.128.logits"][0]).abs().max() <= 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_caches(isa: str, dtype: torch.dtype) -> None:
    model, ids = swapped(8), tokens(100)
    found = native(model, dtype, [ids], [100])[0]
    expected = by_modules(model, torch.float32, ids)
    assert (found - expected).abs().max() <= 0.05 * expected.std()


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_pieces_give_the_same_bits_as_the_whole(isa: str, bits: int, dtype: torch.dtype) -> None:
    model, ids = swapped(bits), tokens(150)
    whole = native(model, dtype, [ids], [150])[0]
    assert torch.equal(native(model, dtype, [ids], [1, 2, 3, 5, 17, 64, 58])[0], whole)


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_rows_side_by_side_give_the_same_bits_as_alone(isa: str, bits: int, dtype: torch.dtype) -> None:
    model = swapped(bits, num_key_value_heads=2)
    rows = [tokens(70, 1), tokens(3, 2), tokens(131, 3), tokens(64, 4)]
    together = native(model, dtype, rows, [2, 60, 1, 70])
    for ids, logits in zip(rows, together, strict=True):
        assert torch.equal(logits, native(model, dtype, [ids], [len(ids)])[0])


@pytest.mark.parametrize(("bits", "dtype"), KINDS)
def test_threads_do_not_change_a_bit(bits: int, dtype: torch.dtype) -> None:
    model, ids = swapped(bits), tokens(90)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(native(model, dtype, [ids], [80, 1, 9])[0])
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_angles_are_those_of_the_modules_at_every_position(head_dim: int) -> None:
    config = random_model(head_dim=head_dim, hidden_size=4 * head_dim, seq_length=300, use_logn_attn=True).config
    kept = Angles(config)
    # from within the first block, across two ends of one, past the trained length, and back
    for starts, lengths, alphas, logn in [
        ([5], (1,), (1.0,), None),
        ([250, 0], (20, 3), (1.0, 3.0), None),
        ([511, 290, 299], (2, 20, 1), (3.0, 1.0, 1.0), (True, False, True)),
        ([32_760], (7,), (7.0,), None),
        ([4], (2,), (7.0,), None),
    ]:
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
        rows = Rows(positions, lengths, alphas, logn)
        cos, sin, factor = kept.of(rows, starts)
        defined = Rotation(config, rows, extend=True)
        # the last bit of a cosine may differ between a vector's lanes and what is left beside them
        torch.testing.assert_close(cos, defined.cos[:, 0], rtol=0, atol=1.2e-7)
        torch.testing.assert_close(sin, defined.sin[:, 0], rtol=0, atol=1.2e-7)
        assert (factor is None) == (defined.logn is None)
        if factor is not None:
            assert torch.equal(factor, defined.logn.flatten())
        alone = Angles(config)
        for at, (start, length, alpha) in enumerate(zip(starts, lengths, alphas, strict=True)):
            begin = sum(lengths[:at])
            for i in range(length):
                one, _, _ = alone.of(Rows.single(start + i, 1, alpha), [start + i])
                assert torch.equal(one[0], cos[begin + i])


def test_a_position_beyond_the_published_table_is_an_error_and_not_read_behind_it() -> None:
    kept = Angles(random_model(seq_length=300, use_logn_attn=True).config)
    with pytest.raises(IndexError):
        kept.of(Rows.single(32_760, 8, 1.0), [32_760])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
def test_how_heads_are_grouped_changes_nothing(isa: str, dtype: torch.dtype) -> None:
    """Groups are for threads: with one, heads lie all together, with four each alone."""
    model, rows, pieces = swapped(8), [tokens(150), tokens(70, 1)], [100, 30, 1, 1, 18]
    threads = torch.get_num_threads()
    found, groups = [], []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            groups.append(PagePool(model.config, 1, dtype, CPU, tiled=True).tiles[0].memory.shape[1])
            found.append(native(model, dtype, rows, pieces))
    finally:
        torch.set_num_threads(threads)
    assert groups == [1, 2, 4]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


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
    found = pool.tiles[0].plain()
    for page, slots in ((0, 64), (1, 6)):
        for ours, expected in ((found.k, plain.k[0]), (found.v, plain.v[0])):
            assert (ours[page, :, :slots].int() - expected[page, :, :slots].int()).abs().max() <= 1


def test_float32_keys_and_values_are_the_modules() -> None:
    """Up to the rounding of the sums they come from: nothing is rounded on the way into a page."""
    ids, rows = tokens(70), Rows.single(0, 70, 1.0)
    tiled = PagePool(random_model().config, 2, torch.float32, CPU, tiled=True)
    pages = PagePool(random_model().config, 2, torch.float32, CPU)
    with torch.inference_mode():
        QwenProgram(swapped(32), tiled, 128).forward(torch.tensor(ids), rows, [[0, 1]], [0], torch.tensor([69]))
        random_model()(torch.tensor(ids), rows, PagedPast(pages, rows, [[0, 1]], [0]))
    found = tiled.tiles[0].plain()
    for page, slots in ((0, 64), (1, 6)):
        for ours, expected in ((found.k, pages.k[0]), (found.v, pages.v[0])):
            torch.testing.assert_close(ours[page, :, :slots], expected[page, :, :slots], rtol=1e-6, atol=1e-6)


def test_what_can_not_be_a_program_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped(4)
    assert obstacle(model, torch.int8) is None
    assert obstacle(swapped(32), torch.float32) is None
    assert "float64 cache" in str(obstacle(model, torch.float64))
    assert "heads of 8" in str(obstacle(swapped(4, head_dim=8, num_attention_heads=16), torch.int8))
    plain = nn.Linear(128, 203, bias=False)
    replace_linear(model, "lm_head", plain)
    assert obstacle(model, torch.int8) == "lm_head is a linear of torch's"
    monkeypatch.setenv("QWENLET_ISA", "torch")
    assert obstacle(swapped(4), torch.int8) == "QWENLET_ISA=torch"
