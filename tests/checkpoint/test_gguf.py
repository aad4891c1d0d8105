"""GGUF tensors: the numbers of the `gguf` library's dequantizers, whatever the type, the shape and the slices; and
files whose directory lies about them."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from checkpoint.variants import write_raw_gguf
from qwenlet.checkpoint import gguf as module
from qwenlet.checkpoint.files import GGUFFile
from qwenlet.checkpoint.gguf import GGUFTensors, row_bytes
from qwenlet.errors import FormatError
from qwenlet.gguf_header import TensorInfo, read_header

PLAIN = (Kind.F32, Kind.F16, Kind.BF16)
OWN = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)
LIBRARY = (Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


def random_rows(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """[rows, bytes]: numbers for plain types, and for blocks any bits at all behind scales that are finite."""
    generator = np.random.default_rng(seed)
    if kind in PLAIN:
        values = torch.from_numpy(generator.standard_normal((rows, columns), np.float32))
        return values.to({0: torch.float32, 1: torch.float16, 30: torch.bfloat16}[kind.value]).view(torch.uint8).numpy()
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = generator.integers(0, 256, (rows, columns // block, size), np.uint8)
    scales = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q6_K: (208,)}.get(
        kind, (0, 2) if kind in (Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K) else (0,)
    )
    for at in scales:  # where a block keeps its float16 numbers
        numbers = generator.standard_normal((rows, columns // block, 1)).astype(np.float16)
        raw[:, :, at : at + 2] = numbers.view(np.uint8)
    return raw.reshape(rows, -1)


def read(path: Path, name: str = "t", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return GGUFTensors(read_header(path)).read(name, dtype)


@pytest.mark.parametrize("kind", [*PLAIN, *OWN, *LIBRARY], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (37, 768)])
def test_values_are_the_librarys_bit_for_bit(tmp_path: Path, kind: Kind, rows: int, columns: int) -> None:
    raw = random_rows(kind, rows, columns)
    expected = torch.from_numpy(dequantize(raw, kind).copy())
    assert expected.isfinite().all(), "the random blocks should be numbers"
    path = write_raw_gguf(tmp_path / "x.gguf", [("t", raw, kind)])
    found = read(path)
    assert found.shape == (rows, columns)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(read(path, dtype=torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("kind", [Kind.F16, *OWN, Kind.Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("slice_elements", [1, 256, 1000, 37 * 256])
def test_slices_dont_show(tmp_path: Path, kind: Kind, slice_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows(kind, 37, 256)
    path = write_raw_gguf(tmp_path / "x.gguf", [("t", raw, kind)])
    whole = read(path)
    monkeypatch.setattr(module, "_SLICE_ELEMENTS", slice_elements)
    assert torch.equal(read(path), whole)


def test_other_ranks_and_several_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "test")
    cube, vector = np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.arange(5, dtype=np.float16)
    writer.add_tensor("vector", vector)
    writer.add_tensor("cube", cube)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(read(path, "vector"), torch.arange(5.0))
    assert torch.equal(read(path, "cube"), torch.from_numpy(cube))
    file = GGUFFile(read_header(path))
    assert list(file.names()) == ["vector", "cube"]
    assert file.shape("cube") == (2, 3, 4)
    assert file.stored_dtype("vector") == torch.float16


def test_what_is_read_is_ours_to_change(tmp_path: Path) -> None:
    path = write_raw_gguf(tmp_path / "x.gguf", [("t", random_rows(Kind.F32, 2, 32), Kind.F32)])
    before = path.read_bytes()
    read(path).zero_()
    assert path.read_bytes() == before


def test_a_quantized_tensor_has_no_stored_dtype(tmp_path: Path) -> None:
    path = write_raw_gguf(tmp_path / "x.gguf", [("t", random_rows(Kind.Q8_0, 2, 32), Kind.Q8_0)])
    assert GGUFFile(read_header(path)).stored_dtype("t") is None


# ------------------------------------------------------------------------------------------------------- bad directory


@pytest.mark.parametrize(
    ("type_id", "name"), [(16, "IQ2_XXS"), (39, "MXFP4"), (28, "F64"), (26, "I32"), (200, "number 200")]
)
def test_a_type_we_dont_read_is_named_with_its_tensor(type_id: int, name: str) -> None:
    with pytest.raises(FormatError, match=rf"tensor blk\.0\.ffn_up\.weight has GGUF type {name}, which is") as caught:
        row_bytes(TensorInfo("blk.0.ffn_up.weight", (2, 256), type_id, 0))
    assert "Q4_0, Q4_1, Q8_0, Q5_0" in str(caught.value.hint)


@pytest.mark.parametrize(("type_id", "columns", "block"), [(2, 48, 32), (8, 1, 32), (14, 128, 256)])
def test_rows_must_be_whole_blocks(type_id: int, columns: int, block: int) -> None:
    with pytest.raises(FormatError, match=f"rows of {columns}, which is not a multiple of its block, {block}"):
        row_bytes(TensorInfo("t", (2, columns), type_id, 0))


def directory(tmp_path: Path, *tensors: tuple[str, tuple[int, ...], int], data: int = 256) -> Path:
    """A file of float32 tensors at the given offsets and `data` bytes behind the header."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0)
    for name, shape, offset in tensors:
        out += struct.pack(f"<Q{len(name)}sI", len(name), name.encode(), len(shape))
        out += struct.pack(f"<{len(shape)}QIQ", *shape, 0, offset)
    path = tmp_path / "x.gguf"
    path.write_bytes(out + b"\0" * (-len(out) % 32) + b"\0" * data)
    return path


@pytest.mark.parametrize(
    ("shape", "offset"),
    [
        ((65,), 0),
        ((64,), 4),
        ((1,), 1 << 63),
        ((1 << 63,), 0),
        ((1 << 32, 1 << 32), 0),  # 2^64 elements: nothing left in 64 bits
        ((1 << 63, 2, 1 << 63, 2), 0),
    ],
)
def test_a_tensor_that_ends_behind_the_file_is_refused(tmp_path: Path, shape: tuple[int, ...], offset: int) -> None:
    path = directory(tmp_path, ("t", shape, offset))
    with pytest.raises(FormatError, match=r"is truncated: t ends at byte \d+, the file at \d+"):
        GGUFTensors(read_header(path))


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    GGUFTensors(read_header(directory(tmp_path, ("a", (16,), 64), ("b", (16,), 0))))  # any order will do
    for offset in (0, 32, 60):
        path = directory(tmp_path, ("a", (16,), 0), ("b", (16,), offset))
        with pytest.raises(FormatError, match=r"is damaged: \w ends at byte \d+, but \w begins at"):
            GGUFTensors(read_header(path))
