"""Weight files: named tensors somewhere on disk, mapped rather than loaded.

Nothing is unpickled without `weights_only`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwenlet.checkpoint.dtypes import DTYPES
from qwenlet.checkpoint.gguf import PLAIN_TYPES, GGUFTensors
from qwenlet.config import read_json
from qwenlet.errors import CheckpointError, ConfigError, FormatError
from qwenlet.gguf_header import GGUFHeader

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


class _Shards:
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

    def stored_dtype(self, name: str) -> torch.dtype | None:
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

    def _directory(self, path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in one file."""
        raise NotImplementedError

    def _tensor(self, name: str) -> Tensor:
        """The tensor as stored, mapped."""
        raise NotImplementedError


class SafetensorsFiles(_Shards):
    def _directory(self, path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        with self._open(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, tuple(file.get_slice(name).get_shape())

    def _tensor(self, name: str) -> Tensor:
        # opened per tensor: the mapping goes with the tensor, so what was converted stops counting as resident
        with self._open(self.where[name]) as file:
            return file.get_tensor(name)

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


class PickledFiles(_Shards):
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


def open_folder(folder: Path) -> WeightFile:
    """The weight files of a model folder. Raises CheckpointError if none are there, or a shard is missing."""
    readers: tuple[tuple[str, type[SafetensorsFiles] | type[PickledFiles]], ...] = (
        ("model.safetensors", SafetensorsFiles),
        ("pytorch_model.bin", PickledFiles),
    )
    for name, reader in readers:
        index = folder / f"{name}.index.json"
        if index.exists():
            return reader(_shards(folder, index))
        if (folder / name).exists():
            return reader([folder / name])
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
