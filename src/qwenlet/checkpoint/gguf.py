"""GGUF tensors as torch tensors, dequantized in slices so that no more than one slice stands in float32.

Q4_0, Q4_1 and Q8_0, which the demo model and most small files are made of, are unpacked here by torch on all cores;
every other type goes through the `gguf` library's dequantizers, which are exact but run on one core.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from qwenlet.checkpoint.mapped import mapped_bytes
from qwenlet.errors import FormatError
from qwenlet.gguf_header import GGUFHeader, TensorInfo

_SLICE_ELEMENTS = 1 << 22
PLAIN_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # GGML's F32, F16, BF16
_OWN_BLOCKS = {2: (32, 18), 3: (32, 20), 8: (32, 34)}  # Q4_0, Q4_1, Q8_0: (elements, bytes) of a block
_LIBRARY_TYPES = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def row_bytes(info: TensorInfo) -> int:
    """Bytes of one row. Raises FormatError for a type we don't read."""
    if info.type_id in PLAIN_TYPES:
        return info.shape[-1] * PLAIN_TYPES[info.type_id].itemsize
    block, size = _OWN_BLOCKS.get(info.type_id) or _library_block(info)
    if info.shape[-1] % block:
        raise FormatError(
            f"tensor {info.name} has rows of {info.shape[-1]}, which is not a multiple of its block, {block}"
        )
    return info.shape[-1] // block * size


def _library_block(info: TensorInfo) -> tuple[int, int]:
    """(elements, bytes) of a block of a type that the `gguf` library dequantizes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    names = {kind.value: kind.name for kind in GGMLQuantizationType}
    name = names.get(info.type_id, f"number {info.type_id}")
    if name not in _LIBRARY_TYPES:
        raise FormatError(
            f"tensor {info.name} has GGUF type {name}, which is not read",
            hint=f"convert the file to one of F32, F16, BF16, Q4_0, Q4_1, Q8_0, {', '.join(_LIBRARY_TYPES)}",
        )
    return GGML_QUANT_SIZES[GGMLQuantizationType[name]]


class GGUFTensors:
    """Opens a GGUF file for reading weights; the bytes stay mapped, not loaded."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        try:
            sizes = {name: row_bytes(info) * _rows(info) for name, info in header.tensors.items()}
        except FormatError as error:
            raise FormatError(f"{header.path}: {error.message}", hint=error.hint) from None
        spans = sorted((info.offset, info.offset + sizes[name], name) for name, info in header.tensors.items())
        for _, end, name in spans:
            if end > header.file_size:
                raise FormatError(
                    f"{header.path} is truncated: {name} ends at byte {end}, the file at {header.file_size}",
                    hint="fetch the file again and compare its checksum",
                )
        for (_, end, name), (start, _, after) in pairwise(spans):
            if start < end:
                raise FormatError(
                    f"{header.path} is damaged: {name} ends at byte {end}, but {after} begins at {start}",
                    hint="fetch the file again and compare its checksum",
                )

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`, in memory of its own."""
        info = self.header.tensors[name]
        raw = self.raw(name)
        out = torch.empty(len(raw), info.shape[-1], dtype=dtype)
        step = max(1, _SLICE_ELEMENTS // info.shape[-1])
        for start in range(0, len(raw), step):
            out[start : start + step] = dequantize_rows(raw[start : start + step], info.type_id)
        return out.reshape(info.shape)

    def raw(self, name: str) -> Tensor:
        """[rows, bytes of a row] uint8, mapped."""
        info = self.header.tensors[name]
        rows, width = _rows(info), row_bytes(info)
        return mapped_bytes(self.header.path, info.offset, rows * width).view(rows, width)


def _rows(info: TensorInfo) -> int:
    return math.prod(info.shape[:-1])


def dequantize_rows(raw: Tensor, type_id: int) -> Tensor:
    """[rows, bytes] uint8 -> [rows, columns] in float32 (or as stored, for plain types)."""
    if type_id in PLAIN_TYPES:
        return raw.view(PLAIN_TYPES[type_id])
    if type_id in _UNPACK:
        return _UNPACK[type_id](raw)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType(type_id)))


def _blocks(raw: Tensor, size: int) -> Tensor:
    return raw.reshape(raw.shape[0], -1, size)


def _half(raw: Tensor) -> Tensor:
    """[..., 2] bytes -> [..., 1] float32, read as one float16."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """[..., 16] bytes -> [..., 32] numbers 0..15: low halves first, as GGML lays them."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _q4_0(raw: Tensor) -> Tensor:
    blocks = _blocks(raw, 18)  # scale, 32 nibbles; value = scale * (nibble - 8)
    return (_half(blocks[..., :2]) * (_nibbles(blocks[..., 2:]).float() - 8)).flatten(1)


def _q4_1(raw: Tensor) -> Tensor:
    blocks = _blocks(raw, 20)  # scale, minimum, 32 nibbles; value = scale * nibble + minimum
    return (_half(blocks[..., :2]) * _nibbles(blocks[..., 4:]).float() + _half(blocks[..., 2:4])).flatten(1)


def _q8_0(raw: Tensor) -> Tensor:
    blocks = _blocks(raw, 34)  # scale, 32 signed bytes
    return (_half(blocks[..., :2]) * blocks[..., 2:].contiguous().view(torch.int8).float()).flatten(1)


_UNPACK = {2: _q4_0, 3: _q4_1, 8: _q8_0}
