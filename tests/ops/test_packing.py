"""Codes in each of their forms: AutoGPTQ's own files, GGUF's blocks, the kernels' tiles; and the ways between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qwenlet.errors import FormatError
from qwenlet.ops import cpu, packing, reference
from qwenlet.ops.packing import (
    GPTQTensors,
    QuantTensor,
    Tiles,
    from_gguf,
    from_gptq,
    from_tiles,
    gguf_to_tiles,
    gptq_to_tiles,
    pack_words,
    stack_tiles,
    to_gptq,
    to_tiles,
    unpack_words,
)

CASES = ["int4_g128_asym", "int4_g128_sym", "int4_g128_sym_desc_act", "int4_g64_sym", "int8_g128_sym"]
FIELDS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.fixture(scope="module")
def layers(golden: Path) -> dict[str, Tensor]:
    """Five linears that AutoGPTQ wrote, with its own dequantized weights and products."""
    return load_file(golden / "gptq_layout.safetensors")


def parts_of(layers: dict[str, Tensor], case: str) -> tuple[GPTQTensors, int, int]:
    bits, group_size = int(case[3]), int(case.split("_")[1][1:])
    return GPTQTensors(*(layers[f"{case}.{field}"] for field in FIELDS)), bits, group_size


def random_weight(
    bits: int, group_size: int, rows: int, groups: int, kind: str = "symmetric", seed: int = 0
) -> QuantTensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, groups * group_size), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator).half()
    weight = QuantTensor(bits, group_size, codes, scales)
    if kind == "zeros":
        return replace(weight, zeros=torch.randint(1, 1 << bits, (rows, groups), generator=generator).to(torch.uint8))
    if kind == "minimums":
        return replace(weight, minimums=torch.rand(rows, groups, generator=generator).half())
    if kind == "ordered":
        return replace(weight, order=torch.randperm(groups * group_size, generator=generator))
    return weight


def assert_same(a: object, b: object) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


# -------------------------------------------------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("case", CASES)
def test_autogptqs_layers_are_read_as_it_reads_them(layers: dict[str, Tensor], case: str) -> None:
    parts, bits, group_size = parts_of(layers, case)
    weight = from_gptq(parts, bits, group_size)
    assert torch.equal(weight.dequantize(), layers[f"{case}.dequantized_weight"])
    assert (weight.zeros is not None) == ("asym" in case)
    assert (weight.order is not None) == ("desc_act" in case)


@pytest.mark.parametrize("case", CASES)
def test_autogptqs_products(layers: dict[str, Tensor], case: str) -> None:
    """1e-3 in float, 1 % with activations in eight bits."""
    weight = from_gptq(*parts_of(layers, case))
    x, bias, y = (layers[f"{case}.{name}"] for name in ("x", "bias", "y"))
    assert (reference.linear_float(x, weight, bias) - y).abs().max() < 1e-3
    assert (reference.linear_int(x, weight, bias) - y).norm() < 0.01 * y.norm()


@pytest.mark.parametrize("case", CASES)
def test_autogptqs_files_are_written_bit_for_bit(layers: dict[str, Tensor], case: str) -> None:
    parts, bits, group_size = parts_of(layers, case)
    assert_same(to_gptq(from_gptq(parts, bits, group_size)), parts)


@pytest.mark.parametrize("case", CASES)
def test_files_become_the_same_tiles_by_both_ways(layers: dict[str, Tensor], case: str) -> None:
    parts, bits, group_size = parts_of(layers, case)
    assert_same(gptq_to_tiles(parts, bits, group_size), to_tiles(from_gptq(parts, bits, group_size)))
    if cpu.available():
        native = gptq_to_tiles(parts, bits, group_size, cpu.words_to_lines)
        assert_same(native, to_tiles(from_gptq(parts, bits, group_size)))


def test_groups_that_are_not_full_are_refused(layers: dict[str, Tensor]) -> None:
    parts, bits, group_size = parts_of(layers, "int4_g128_sym")
    for wrong in (torch.zeros(256, dtype=torch.int32), torch.arange(256, dtype=torch.int32), parts.g_idx[:-1]):
        with pytest.raises(FormatError, match="full groups of 128"):
            from_gptq(replace(parts, g_idx=wrong), bits, group_size)


def test_what_gptq_files_cant_say(layers: dict[str, Tensor]) -> None:
    with pytest.raises(FormatError, match="minimums"):
        to_gptq(random_weight(4, 32, 16, 2, "minimums"))
    zeros = torch.zeros(16, 2, dtype=torch.uint8)
    with pytest.raises(FormatError, match="can't hold a 0"):
        to_gptq(replace(random_weight(4, 32, 16, 2), zeros=zeros))


# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("bits", [4, 8])
def test_the_first_code_lies_in_the_lowest_bits(bits: int) -> None:
    per_word = 32 // bits
    codes = torch.arange(2 * per_word, dtype=torch.uint8) % 13
    words = pack_words(codes, bits)
    for column, code in enumerate(codes.tolist()):
        assert words[column // per_word].item() >> (bits * (column % per_word)) & ((1 << bits) - 1) == code
    assert torch.equal(unpack_words(words, bits), codes)


# ------------------------------------------------------------------------------------------------------------- tiles


@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    kind=st.sampled_from(["symmetric", "zeros", "minimums", "ordered"]),
    seed=st.integers(0, 9),
)
def test_tiles_hold_the_weight(bits: int, group_size: int, rows: int, groups: int, kind: str, seed: int) -> None:
    weight = random_weight(bits, group_size, rows, groups, kind, seed)
    tiles = to_tiles(weight)
    assert tiles.weight.shape == ((rows + 15) // 16, groups * group_size * bits // 32, 16)
    assert_same(from_tiles(tiles), weight)
    padding = packing._tables(tiles)["weight"].transpose(1, 2).flatten(0, 1)[rows:]
    assert not padding.any(), "rows that are not there must add nothing"


def test_a_tile_is_sixteen_rows_words_side_by_side() -> None:
    weight = random_weight(4, 32, 32, 2)
    words = pack_words(weight.codes, 4)
    tiles = to_tiles(weight)
    assert tiles.weight[1, 5, 3] == words[16 + 3, 5]
    assert tiles.scales[1, 0, 3] == weight.scales[16 + 3, 0]


@pytest.mark.parametrize("rows", [8, 16, 24, 40])
def test_rows_that_fill_no_tile(rows: int) -> None:
    weight = random_weight(4, 32, rows, 2, "zeros")
    assert_same(gptq_to_tiles(to_gptq(weight), 4, 32), to_tiles(weight))


# -------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1,
                                  gguf.GGMLQuantizationType.Q8_0], ids=lambda kind: kind.name)  # fmt: skip
def test_ggufs_blocks_lose_nothing(kind: gguf.GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((70, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, kind)
    weight = from_gguf(kind.value, torch.from_numpy(raw))
    assert torch.equal(weight.dequantize(), torch.from_numpy(gguf.quants.dequantize(raw, kind)))
    monkeypatch.setattr(packing, "_STEP_ROWS", 32)  # several slices, the last one short
    assert_same(gguf_to_tiles(kind.value, torch.from_numpy(raw)), to_tiles(weight))


def test_pieces_become_one() -> None:
    weight = random_weight(8, 64, 40, 2)
    pieces = (replace(weight, codes=weight.codes[rows], scales=weight.scales[rows])
              for rows in (slice(0, 32), slice(32, 40)))  # fmt: skip
    whole: Tiles = stack_tiles(pieces, 40)
    assert_same(whole, to_tiles(weight))
