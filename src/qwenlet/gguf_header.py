"""What a GGUF file says before its tensors: metadata and the tensor directory.

Covered: versions 2 and 3, little endian, every metadata type, bounds checked against the file's size, so that a
truncated or hostile file ends in a FormatError and never in a huge allocation. Not covered: the tensors' bytes (see
checkpoint/gguf.py). The `gguf` library reads the same header some thirty times slower (one numpy view per vocabulary
word), which a user would feel at every start; its dequantizers are used where the weights are read.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlet.errors import FormatError

MAGIC = b"GGUF"

# metadata value types, by their number in the file
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One row of the directory. `shape` is in PyTorch's order, rows first; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_size: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


class _Cursor:
    """Reads forward through the mapped file; every read is checked against its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position, self.size = data, path, 0, len(data)

    def fail(self, what: str) -> FormatError:
        return FormatError(
            f"{self.path} is not a readable GGUF file: {what} at byte {self.position} of {self.size}",
            hint="the file is truncated or damaged; fetch it again and compare its checksum",
        )

    def scalar(self, fmt: str) -> Any:
        width = struct.calcsize(fmt)
        if self.position + width > self.size:
            raise self.fail("the file ends inside a number")
        (value,) = struct.unpack_from(fmt, self.data, self.position)
        self.position += width
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        end = self.position + length
        if end > self.size:
            raise self.fail(f"a string claims {length} bytes")
        raw = self.data[self.position : end]
        self.position = end
        return raw.decode("utf-8", "surrogateescape")

    def value(self, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self.array()
        raise self.fail(f"unknown metadata type {type_id}")

    def array(self) -> list[Any]:
        item_type, count = self.scalar("<I"), self.scalar("<Q")
        if item_type in _SCALARS:
            fmt = _SCALARS[item_type]
            width = struct.calcsize(fmt)
            if count > (self.size - self.position) // width:
                raise self.fail(f"an array claims {count} items")
            values = list(struct.unpack_from(f"<{count}{fmt[1]}", self.data, self.position))
            self.position += count * width
            return values
        if item_type == _STRING:
            if count > (self.size - self.position) // 8:
                raise self.fail(f"an array claims {count} strings")
            return [self.string() for _ in range(count)]
        raise self.fail(f"an array of type {item_type}")


def is_gguf(path: Path) -> bool:
    """True if the file starts with GGUF's magic bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: str | Path) -> GGUFHeader:
    """Reads metadata and tensor directory.

    Raises:
        FormatError: not a GGUF file, an unknown version, a header that does not fit the file, or no reading it at all.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            if magic != MAGIC:
                raise FormatError(
                    f"{path} is not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}",
                    hint="give a .gguf file, or the folder that holds config.json and the weights",
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path), path)
    except OSError as error:
        raise FormatError(f"{path} can't be read as a GGUF file: {error.strerror or error}") from error


def _parse(cursor: _Cursor, path: Path) -> GGUFHeader:
    cursor.position = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise FormatError(
            f"{path} is GGUF version {version}; versions 2 and 3 (little endian) are read",
            hint="convert the file with a current llama.cpp",
        )
    tensor_count, pair_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise cursor.fail(f"the key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    rows: dict[str, tuple[tuple[int, ...], int, int]] = {}  # name: shape, type, offset behind the header
    for _ in range(tensor_count):
        name = cursor.string()
        rank = cursor.scalar("<I")
        if not 1 <= rank <= _MAX_DIMENSIONS:
            raise cursor.fail(f"tensor {name!r} claims {rank} dimensions")
        shape = tuple(reversed([cursor.scalar("<Q") for _ in range(rank)]))
        if name in rows or 0 in shape:
            raise cursor.fail(f"tensor {name!r} {'comes twice' if name in rows else f'has the shape {list(shape)}'}")
        rows[name] = (shape, cursor.scalar("<I"), cursor.scalar("<Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise cursor.fail(f"general.alignment is {alignment!r}")
    base = -(-cursor.position // alignment) * alignment
    tensors = {name: TensorInfo(name, shape, kind, base + offset) for name, (shape, kind, offset) in rows.items()}
    return GGUFHeader(path, metadata, tensors, cursor.size)
