"""Quantized modules in one file, in the kernels' order: mapped as it lies, so that nothing is moved at the next start.

    tensors, each at a multiple of 64 bytes | JSON: "about", "modules", "spans" | where the JSON begins, 8 bytes | mark

The index comes last, so that modules are written as they are made and never stand in memory together. The files are a
cache of ours, not a format to hand on: one that isn't whole or doesn't fit the model counts as not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qwenlet.checkpoint.mapped import file_rows, mapped_bytes
from qwenlet.checkpoint.moving import moving_bytes
from qwenlet.checkpoint.partial import partial_path, remove_left
from qwenlet.linear import QuantEmbedding, QuantLinear, TiledLinear
from qwenlet.ops.packing import TILE_ROWS, Tiles

SUFFIX = ".tiles"
_MARK = b"qwtiles1"
_LINE = 64
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.int32, torch.float16, torch.uint8, torch.int8, torch.int64, torch.float32,
)}  # fmt: skip
_TABLES = ("weight", "scales", "zeros", "minimums", "order")


class TileWriter:
    """A context in which modules are put into a file one after the other; it takes its name when the context ends well.

    Args:
        about: what `TileFile.about` gives back.
    Raises:
        OSError: from any call; nothing is left behind.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self._about = path, about
        self._work = partial_path(path)
        self._modules: dict[str, dict[str, Any]] = {}
        self._spans: dict[str, tuple[str, list[int], int, int]] = {}

    def __enter__(self) -> TileWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_left(self.path.parent)
        self._file = open(self._work, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._modules:
                index = {"about": self._about, "modules": self._modules, "spans": self._spans}
                begin = self._file.tell()
                self._file.write(json.dumps(index).encode() + begin.to_bytes(8, "little") + _MARK)
                self._file.close()
                os.replace(self._work, self.path)
        finally:
            self._file.close()
            self._work.unlink(missing_ok=True)

    def put(self, name: str, module: nn.Module) -> bool:
        """Whether this module is one to keep, and is written now: an embedding only if it doesn't lie in a file."""
        held = _held(module)
        if held is None:
            return False
        self._modules[name], parts = held
        for leaf, part in parts.items():
            self._file.write(bytes(-self._file.tell() % _LINE))
            begin = self._file.tell()
            self._file.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
            dtype = str(part.dtype).removeprefix("torch.")
            self._spans[f"{name}.{leaf}"] = (dtype, list(part.shape), begin, begin + part.nbytes)
        return True


def _held(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What is said of a module and its tensors; None for one that isn't kept."""
    if isinstance(module, QuantLinear | TiledLinear):
        tiles = module.tiles
        said = {"bits": tiles.bits, "group_size": tiles.group_size, "rows": tiles.rows}
        parts = {leaf: getattr(tiles, leaf) for leaf in _TABLES} | {"bias": module.bias}
        return said, {leaf: part for leaf, part in parts.items() if part is not None and part.numel()}
    if isinstance(module, QuantEmbedding) and module.rows is None:
        return {"embedding": True}, {"codes": module.codes.flatten(1), "scales": module.scales}
    return None


@dataclass(frozen=True)
class TileFile:
    """Modules by name, made of a mapped file's memory.

    Attributes:
        about: what the writer said.
    """

    path: Path
    about: dict[str, Any]
    _modules: dict[str, dict[str, Any]]
    _spans: dict[str, tuple[str, list[int], int, int]]  # dtype, shape, first and last byte
    _end: int  # of the tensors

    @classmethod
    def open(cls, path: Path) -> TileFile | None:
        """None if the file isn't there, or isn't one of ours, or not whole."""
        try:
            with open(path, "rb") as file:
                end = file.seek(-8 - len(_MARK), os.SEEK_END)
                tail = file.read()
                begin = int.from_bytes(tail[:8], "little")
                if tail[8:] != _MARK or not 0 < begin < end:
                    return None
                file.seek(begin)
                index = json.loads(file.read(end - begin))
            return cls(path, index["about"], index["modules"], index["spans"], begin)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def modules(self, model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module] | None:
        """What stands in for the float modules of `model`, by name; None where one doesn't fit."""
        mapped = mapped_bytes(self.path, 0, self._end)
        # of an embedding few rows are looked at; linears are read whole for each token
        begin, end = self._linears()
        linears = moving_bytes(self.path, begin, end - begin)
        floats = dict(model.named_modules())
        made = {}
        for name, said in self._modules.items():
            memory, at = (mapped, 0) if "embedding" in said else (linears, begin)
            parts = {leaf: self._tensor(memory, at, f"{name}.{leaf}") for leaf in (*_TABLES, "bias", "codes")}
            if "embedding" in said:
                module = self._embedding(name, floats.get(name), parts, dtype)
            else:
                module = _linear(floats.get(name), parts, said)
            if module is None:
                return None
            made[name] = module
        return made

    def _linears(self) -> tuple[int, int]:
        """Where in the file they begin and end."""
        tables = {
            f"{name}.{leaf}"
            for name, said in self._modules.items()
            if "embedding" not in said
            for leaf in (*_TABLES, "bias")
        }
        spans = [(begin, end) for name, (_, _, begin, end) in self._spans.items() if name in tables]
        return min((begin for begin, _ in spans), default=0), max((end for _, end in spans), default=0)

    def _tensor(self, memory: Tensor, at: int, name: str) -> Tensor | None:
        """A tensor out of memory that holds the file from byte `at` on."""
        if name not in self._spans:
            return None
        dtype, shape, begin, end = self._spans[name]
        return memory[begin - at : end - at].view(_DTYPES[dtype]).view(shape)

    def _embedding(
        self, name: str, module: nn.Module | None, parts: dict[str, Tensor | None], dtype: torch.dtype
    ) -> nn.Module | None:
        codes, scales = parts["codes"], parts["scales"]
        if not isinstance(module, nn.Embedding) or codes is None or scales is None:
            return None
        if codes.shape != module.weight.shape or codes.dtype != torch.int8 or len(scales) != len(codes):
            return None
        tables = ((self._spans[f"{name}.{leaf}"][2], part) for leaf, part in (("codes", codes), ("scales", scales)))
        rows = file_rows(*((self.path, begin, part.shape, part.dtype) for begin, part in tables))
        return QuantEmbedding(codes, scales, dtype, rows)


def _linear(module: nn.Module | None, parts: dict[str, Tensor | None], said: dict[str, Any]) -> nn.Module | None:
    bits, group_size, rows, weight = said["bits"], said["group_size"], said["rows"], parts["weight"]
    if not isinstance(module, nn.Linear) or weight is None or rows != module.out_features:
        return None
    tiles, columns = -(-rows // TILE_ROWS), module.in_features
    if weight.dtype != torch.int32 or weight.shape != (tiles, columns * bits // 32, TILE_ROWS):
        return None
    scales = parts["scales"]
    if scales is None:
        return TiledLinear(Tiles(bits, 0, rows, weight, _NO_SCALES), parts["bias"])
    tables = [scales, *(table for leaf in ("zeros", "minimums") if (table := parts[leaf]) is not None)]
    if any(table.shape != (tiles, columns // group_size, TILE_ROWS) for table in tables):
        return None
    return QuantLinear(
        Tiles(bits, group_size, rows, weight, scales, parts["zeros"], parts["minimums"], parts["order"]), parts["bias"]
    )


_NO_SCALES = torch.empty(0, dtype=torch.float16)


def tile_files(folder: Path) -> Iterator[TileFile]:
    """Those of a folder."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        file = TileFile.open(path)
        if file is not None:
            yield file
