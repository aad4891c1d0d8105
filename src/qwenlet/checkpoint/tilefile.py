"""Quantized modules in one file, in the kernels' order: mapped as it lies, so that nothing is moved at the next start.

The container is safetensors, its data 64-byte aligned; `__metadata__` holds JSON under "modules" and "about". The files
are a cache of ours, never a format to hand on: one that isn't whole or doesn't fit the model is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwenlet.checkpoint.mapped import let_go, mapped_bytes
from qwenlet.linear import QuantEmbedding, QuantLinear, TiledLinear
from qwenlet.ops.packing import TILE_ROWS, Tiles

_LINE = 64
_DTYPES = {
    "I32": torch.int32, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8, "I64": torch.int64,
    "F32": torch.float32,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TABLES = ("weight", "scales", "zeros", "minimums", "order")
_HEADER_LIMIT = 16 << 20


def write_tile_file(path: Path, model: nn.Module, about: dict[str, Any]) -> int:
    """Writes the model's modules in codes or tiles; an embedding only if it doesn't lie in a file already.

    Args:
        about: what `TileFile.about` gives back.
    Returns:
        The number of modules; 0: nothing was written.
    Raises:
        OSError: the file could not be written; nothing is left behind.
    """
    modules: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        held = _held(module)
        if held is not None:
            modules[name], parts = held
            tensors |= {f"{name}.{leaf}": part for leaf, part in parts.items()}
    if not modules:
        return 0
    # whole lines first, then what is smaller: so everything is aligned without gaps, which safetensors doesn't allow
    ordered = sorted(tensors.items(), key=lambda item: -(item[1].nbytes & -item[1].nbytes))
    header: dict[str, Any] = {"__metadata__": {"modules": json.dumps(modules), "about": json.dumps(about)}}
    at = 0
    for name, tensor in ordered:
        span = [at, at + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _LINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(work, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()  # the rest goes past Python's buffer
            for _, tensor in ordered:
                tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)
    return len(modules)


def _held(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What is said of a module and its tensors; None for one that isn't kept."""
    if isinstance(module, QuantLinear | TiledLinear):
        tiles = module.tiles
        said = {"bits": tiles.bits, "group_size": tiles.group_size, "rows": tiles.rows}
        parts = {leaf: getattr(tiles, leaf) for leaf in _TABLES} | {"bias": module.bias}
        return said, {leaf: part for leaf, part in parts.items() if part is not None and part.numel()}
    if isinstance(module, QuantEmbedding) and module.let_go is None:
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
    _spans: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]  # dtype, shape, first and last byte
    _data: int  # where tensors begin

    @classmethod
    def open(cls, path: Path) -> TileFile | None:
        """None if the file isn't there, or isn't one of ours, or not whole."""
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if not 0 < size <= _HEADER_LIMIT:
                    return None
                header = json.loads(file.read(size))
                said = header.pop("__metadata__")
                modules, about = json.loads(said["modules"]), json.loads(said["about"])
                spans = {
                    name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                    for name, entry in header.items()
                }
                whole = file.seek(0, os.SEEK_END) == 8 + size + max(span[3] for span in spans.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(path, about, modules, spans, 8 + size) if whole else None

    def modules(self, model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module] | None:
        """What stands in for the float modules of `model`, by name; None where one doesn't fit."""
        end = self._data + max(span[3] for span in self._spans.values())
        memory = mapped_bytes(self.path, 0, end)[self._data :]
        floats = dict(model.named_modules())
        made = {}
        for name, said in self._modules.items():
            parts = {leaf: self._tensor(memory, f"{name}.{leaf}") for leaf in (*_TABLES, "bias", "codes")}
            if "embedding" in said:
                module = _embedding(floats.get(name), parts, dtype)
            else:
                module = _linear(floats.get(name), parts, said)
            if module is None:
                return None
            made[name] = module
        return made

    def _tensor(self, memory: Tensor, name: str) -> Tensor | None:
        if name not in self._spans:
            return None
        dtype, shape, begin, end = self._spans[name]
        return memory[begin:end].view(dtype).view(shape)


def _embedding(module: nn.Module | None, parts: dict[str, Tensor | None], dtype: torch.dtype) -> nn.Module | None:
    codes, scales = parts["codes"], parts["scales"]
    if not isinstance(module, nn.Embedding) or codes is None or scales is None:
        return None
    if codes.shape != module.weight.shape or codes.dtype != torch.int8 or len(scales) != len(codes):
        return None
    return QuantEmbedding(codes, scales, dtype, partial(let_go, codes))


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
    for path in sorted(folder.glob("*.safetensors")):
        file = TileFile.open(path)
        if file is not None:
            yield file
