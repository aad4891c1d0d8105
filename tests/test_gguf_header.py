"""GGUF headers: what is read of a whole one, and that no damage ends in anything but a FormatError."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.errors import FormatError
from qwenlet.gguf_header import MAGIC, is_gguf, read_header


def pack(*pairs: tuple[str, Any]) -> bytes:
    """Numbers by their struct letter; 's' is a string with its length before it."""
    return b"".join(
        struct.pack("<Q", len(value)) + value if letter == "s" else struct.pack(f"<{letter}", value)
        for letter, value in pairs
    )


def start(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return MAGIC + pack(("I", version), ("Q", tensors), ("Q", keys))


def tensor(name: bytes = b"t", shape: tuple[int, ...] = (2,), type_id: int = 0, offset: int = 0) -> bytes:
    sizes = [("Q", size) for size in shape]
    return pack(("s", name), ("I", len(shape)), *sizes, ("I", type_id), ("Q", offset))


def put(folder: Path, data: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(data)
    return path


def small_file(folder: Path) -> Path:
    path = folder / "small.gguf"
    writer = gguf.GGUFWriter(path, "qwen")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -6000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Qwen 通义千问")
    writer.add_array("words", ["a", "Ġb", "千"])
    writer.add_array("numbers", [3, 1, 2])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_tensor("matrix", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("vector", np.ones(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_metadata_type_and_the_directory(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    header = read_header(path)
    assert header.architecture == "qwen"
    assert {key: value for key, value in header.metadata.items() if not key.startswith("general.")} == {
        "u8": 200, "i8": -5, "u16": 60000, "i16": -6000, "u32": 4_000_000_000, "i32": -2_000_000_000, "u64": 1 << 63,
        "i64": -(1 << 62), "f32": 0.5, "f64": 0.1, "yes": True, "text": "Qwen 通义千问", "words": ["a", "Ġb", "千"],
        "numbers": [3, 1, 2], "floats": [0.5, -1.0],
    }  # fmt: skip
    assert list(header.tensors) == ["matrix", "vector"]
    matrix, vector = header.tensors.values()
    assert (matrix.shape, matrix.type_id) == ((2, 3), 0)
    assert (vector.shape, vector.type_id) == ((5,), 1)
    data = path.read_bytes()
    assert np.frombuffer(data, np.float32, 6, matrix.offset).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.frombuffer(data, np.float16, 5, vector.offset).tolist() == [1] * 5
    assert header.file_size == len(data)


def test_the_demo_models_header_agrees_with_the_gguf_library(demo_gguf: Path) -> None:
    ours, theirs = read_header(demo_gguf), gguf.GGUFReader(demo_gguf)
    assert set(ours.metadata) == {name for name in theirs.fields if not name.startswith("GGUF.")}
    assert ours.metadata["tokenizer.ggml.tokens"][:50] == theirs.fields["tokenizer.ggml.tokens"].contents()[:50]
    assert {(t.name, t.shape, t.type_id, t.offset) for t in ours.tensors.values()} == {
        (t.name, tuple(int(size) for size in t.shape[::-1]), t.tensor_type.value, t.data_offset) for t in theirs.tensors
    }


def test_a_string_that_is_not_utf8_comes_back_unchanged(tmp_path: Path) -> None:
    path = put(tmp_path, start(keys=1) + pack(("s", b"k"), ("I", 8), ("s", b"\xff\xfe")))
    assert read_header(path).metadata["k"].encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_is_gguf(tmp_path: Path) -> None:
    assert is_gguf(put(tmp_path, start()))
    assert not is_gguf(put(tmp_path, b"PK\x03\x04"))
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------------------- damage

KEY = pack(("s", b"k"))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", r"not a GGUF file: it starts with b'', expected b'GGUF'"),
        (b"GGU", r"it starts with b'GGU'"),
        (b"PK\x03\x04 a zip", r"it starts with b'PK\\x03\\x04'"),
        (MAGIC, "the file ends inside a number at byte 4 of 4"),
        (start(version=1), "is GGUF version 1; versions 2 and 3"),
        (start(version=3 << 24), "is GGUF version 50331648"),  # big endian
        (start(keys=1 << 60), "ends inside a number"),
        (start(tensors=1 << 60), "ends inside a number"),
        (start(keys=1) + pack(("Q", 1 << 62)), "a string claims 4611686018427387904 bytes"),
        (start(keys=1) + KEY + pack(("I", 13), ("Q", 0)), "unknown metadata type 13"),
        (start(keys=1) + KEY + pack(("I", 9), ("I", 4), ("Q", 1 << 61)), "an array claims 2305843009213693952 items"),
        (start(keys=1) + KEY + pack(("I", 9), ("I", 8), ("Q", 1 << 61)), "an array claims 2305843009213693952 strings"),
        (start(keys=1) + KEY + pack(("I", 9), ("I", 9), ("Q", 1)), "an array of type 9"),
        (start(keys=2) + (KEY + pack(("I", 0), ("B", 1))) * 2, "the key 'k' comes twice"),
        (start(tensors=1) + tensor(shape=()), "tensor 't' claims 0 dimensions"),
        (start(tensors=1) + tensor(shape=(1,) * 5), "tensor 't' claims 5 dimensions"),
        (start(tensors=1) + tensor(shape=(4, 0)), r"tensor 't' has the shape \[0, 4\]"),
        (start(tensors=2) + tensor() * 2, "tensor 't' comes twice"),
        (start(keys=1) + pack(("s", b"general.alignment"), ("I", 4), ("I", 0)), "general.alignment is 0"),
        (start(keys=1) + pack(("s", b"general.alignment"), ("I", 8), ("s", b"32")), "general.alignment is '32'"),
    ],
)
def test_a_damaged_header_says_what_and_where(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = put(tmp_path, data)
    with pytest.raises(FormatError, match=complaint) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_directory_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="can't be read as a GGUF file: Is a directory"):
        read_header(tmp_path)


def test_a_header_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path)
    data = whole.read_bytes()
    end = min(info.offset for info in read_header(whole).tensors.values()) - 32  # at least; padding may follow
    for length in range(end):
        with pytest.raises(FormatError):
            read_header(put(tmp_path, data[:length]))


@given(junk=st.binary(max_size=300), counts=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_junk_behind_the_magic_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, counts: tuple[int, int]
) -> None:
    path = put(tmp_path_factory.getbasetemp(), start(*counts) + junk)
    try:
        header = read_header(path)
    except FormatError:
        return
    assert len(header.tensors) == counts[0]
    assert len(header.metadata) == counts[1]
