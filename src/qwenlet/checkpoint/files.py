"""Weight files: named tensors somewhere on disk, mapped rather than loaded.

Nothing is unpickled without `weights_only`. Quantized tensors appear as the float tensors they stand for; who can run
them as they are asks for their tiles.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qwenlet.checkpoint.dtypes import DTYPES
from qwenlet.checkpoint.gguf import PLAIN_TYPES, GGUFTensors, dequantize_rows
from qwenlet.checkpoint.mapped import by_rows, file_rows, mapped_bytes
from qwenlet.checkpoint.names import Part, join, unpermute
from qwenlet.config import read_json
from qwenlet.errors import CheckpointError, ConfigError, FormatError
from qwenlet.gguf_header import GGUFHeader
from qwenlet.linear import MappedEmbedding, QuantEmbedding
from qwenlet.ops.packing import GGUF_BLOCK, Q4_0, Q4_1, Q8_0, Tiles, gguf_to_tiles

# A mapped `.bin` is opened anew after so many bytes, so that what was read stops counting as resident.
_REMAP_BYTES = 128 << 20
# Tensors of a `.bin` share its mapping; a small one is copied, lest it keep all that was read through it resident.
_COPY_BELOW = 1 << 20


class WeightFile(Protocol):
    """Named tensors somewhere on disk."""

    def names(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype on disk, None for a quantized tensor."""
        ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`: mapped if it is stored like that, else converted into memory of its own."""
        ...

    def read_tiles(self, parts: Sequence[Part]) -> Tiles | None:
        """The parts' rows one after the other as kernels read them; None unless all are in codes of one kind."""
        ...

    def read_embedding(self, name: str, dtype: torch.dtype) -> nn.Module | None:
        """A table as it is stored, mapped; its rows become `dtype` when asked for. None where it is `dtype` already."""
        ...


def _as_stored(rows: Tensor) -> Tensor:
    return rows


class Shards:
    """What safetensors and `.bin` have in common: tensors by name in one or several files."""

    def __init__(self, paths: list[Path]) -> None:
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            for name, shape in self._directory(path):
                if name in self.where:
                    raise FormatError(f"{name} is both in {self.where[name]} and in {path.name}")
                self.where[name], self.shapes[name] = path, shape

    def names(self) -> Iterator[str]:
        return iter(self.where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._tensor(name)
        if tensor.dtype not in DTYPES.values():
            raise FormatError(
                f"{name} in {self.where[name]} is stored as {str(tensor.dtype).removeprefix('torch.')}, "
                "expected float16, bfloat16 or float32",
                hint="integers and eight-bit floats are quantized weights; load the unquantized checkpoint",
            )
        return tensor.to(dtype)

    def stored(self, name: str) -> Tensor:
        """The tensor as it is stored, mapped."""
        return self._tensor(name)

    def read_tiles(self, parts: Sequence[Part]) -> Tiles | None:
        return None

    def read_embedding(self, name: str, dtype: torch.dtype) -> nn.Module | None:
        stored = self.stored_dtype(name)
        if stored == dtype or stored not in DTYPES.values():
            return None  # what is no float type `read` refuses by name
        return MappedEmbedding(by_rows(self._tensor(name)), _as_stored, dtype)

    def _directory(self, path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in one file."""
        raise NotImplementedError

    def _tensor(self, name: str) -> Tensor:
        """The tensor as stored, mapped."""
        raise NotImplementedError


# By the names of safetensors' headers.
_STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class SafetensorsFiles(Shards):
    def __init__(self, paths: list[Path]) -> None:
        self._spans: dict[str, tuple[str, int, int]] = {}  # dtype, first byte, number of bytes
        super().__init__(paths)

    def _directory(self, path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        with self._open(path):
            pass  # the library's checks: a whole file whose tensors fill it
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                self._spans[name] = (entry["dtype"], 8 + size + begin, end - begin)
                yield name, tuple(entry["shape"])

    def stored_dtype(self, name: str) -> torch.dtype:
        dtype = self._spans[name][0]
        if dtype not in _STORED:
            raise FormatError(f"{name} in {self.where[name]} is stored as {dtype}, which is not read")
        return _STORED[dtype]

    def _tensor(self, name: str) -> Tensor:
        dtype, shape = self.stored_dtype(name), self.shapes[name]
        _, offset, size = self._spans[name]
        raw = mapped_bytes(self.where[name], offset, size)
        return (raw.clone() if offset % dtype.itemsize else raw).view(dtype).view(shape)

    def rows(self, *names: str) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        """Reads rows [N] of these tensors, without mapping them; None where the system has no such way."""
        return file_rows(
            *((self.where[name], self._spans[name][1], self.shapes[name], self.stored_dtype(name)) for name in names)
        )

    @contextmanager
    def _open(self, path: Path) -> Iterator[safe_open]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise FormatError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}",
                hint="the file is truncated or damaged; fetch it again and compare its checksum",
            ) from None
        except OSError as error:
            raise FormatError(f"{path} can't be read as a safetensors file: {error}") from error


class PickledFiles(Shards):
    """PyTorch's own `.bin`, mapped, tensors only."""

    def __init__(self, paths: list[Path]) -> None:
        self._mapped: tuple[Path, dict[str, Tensor], int] | None = None
        super().__init__(paths)

    def _directory(self, path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((name, tuple(tensor.shape)) for name, tensor in self._load(path).items())

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = super().read(name, dtype)
        return tensor.clone() if tensor.nbytes < _COPY_BELOW else tensor

    def _tensor(self, name: str) -> Tensor:
        path, size = self.where[name], 4 * math.prod(self.shapes[name])  # bytes, at most
        if self._mapped is None or self._mapped[0] != path or self._mapped[2] + size > _REMAP_BYTES:
            self._mapped = None
            self._mapped = (path, self._load(path), 0)
        _, state, read = self._mapped
        self._mapped = (path, state, read + size)
        return state[name]

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            # torch colours its messages for terminals
            text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
            reason = text.splitlines()[0] if text else type(error).__name__
            raise FormatError(
                f"{path} ({path.stat().st_size} bytes) can't be read as a file of tensors: {reason}",
                hint="it is truncated, damaged, older than torch 1.6, or holds more than tensors; "
                "prefer the .safetensors files",
            ) from None
        if not isinstance(state, dict) or not all(_is_named_tensor(*item) for item in state.items()):
            raise FormatError(
                f"{path} holds something else than names and plain tensors",
                hint="save the model's state_dict() alone, or prefer the .safetensors files",
            )
        return state


def _is_named_tensor(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


# GGUF's types that run as they are
RUNNABLE_TYPES = frozenset((Q4_0, Q4_1, Q8_0))


class GGUFFile:
    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.tensors = header, GGUFTensors(header)

    def names(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.header.tensors[name].shape

    def stored_dtype(self, name: str) -> torch.dtype | None:
        return PLAIN_TYPES.get(self.header.tensors[name].type_id)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.tensors.read(name, dtype)

    def read_tiles(self, parts: Sequence[Part]) -> Tiles | None:
        kinds = {self.header.tensors[part.name].type_id for part in parts}
        if len(kinds) > 1 or not kinds <= RUNNABLE_TYPES:
            return None
        # a row's codes and scales lie together, so rows move as bytes
        rows = [unpermute(self.tensors.raw(part.name), part.permuted_heads) for part in parts]
        return gguf_to_tiles(kinds.pop(), join(rows))

    def read_embedding(self, name: str, dtype: torch.dtype) -> nn.Module | None:
        type_id, raw = self.header.tensors[name].type_id, self.tensors.raw(name)
        if PLAIN_TYPES.get(type_id) == dtype:
            return None
        by_rows(raw)
        if type_id == Q8_0:
            blocks = raw.unflatten(1, (-1, 2 + GGUF_BLOCK))
            return QuantEmbedding(blocks[..., 2:].view(torch.int8), blocks[..., :2].view(torch.float16)[..., 0], dtype)
        return MappedEmbedding(raw, partial(dequantize_rows, type_id=type_id), dtype)


def read_parts(weights: WeightFile, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """One tensor of ours."""
    return join([unpermute(weights.read(part.name, dtype), part.permuted_heads) for part in parts])


def open_folder(folder: Path) -> Shards:
    """The weight files of a model folder. Raises CheckpointError if none are there, or a shard is missing."""
    paths = weight_paths(folder)
    return PickledFiles(paths) if paths[0].suffix == ".bin" else SafetensorsFiles(paths)


def weight_paths(folder: Path) -> list[Path]:
    """Where they lie. Raises CheckpointError as `open_folder` does."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            return _shards(folder, index)
        if (folder / name).exists():
            return [folder / name]
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{folder} has no weights: expected model.safetensors, pytorch_model.bin or an index of shards; found {found}",
        hint="fetch the whole checkpoint, for example with: qwenlet pull NAME",
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError as error:
        raise FormatError(error.message, hint="fetch the index again") from None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(
            f"{index} has no weight_map, expected one of tensor names to file names", hint="fetch the index again"
        )
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if name in ("", "..") or Path(name).name != name]
    if outside:
        raise FormatError(
            f"{index} names files outside its folder: {', '.join(map(repr, outside))}",
            hint="an index names files beside it; don't trust this checkpoint",
        )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(names)} files, of which {len(missing)} are missing: {', '.join(missing)}",
            hint="the download is incomplete; run the same qwenlet pull again, it resumes",
        )
    return [folder / name for name in names]
