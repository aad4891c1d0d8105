"""What a step needs to know, in one buffer that goes to the device in one copy.

Dimension letters: B rows of the bucket, P pages of the longest request.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
EMPTY = -1  # position of a row that nobody uses

_ALIGN = 16  # bytes


def bucket_of(rows: int) -> int:
    """The smallest bucket for so many rows, at most the last one."""
    return next(size for size in BUCKETS if size >= rows)


@dataclass(frozen=True)
class Inputs:
    """Views of one buffer.

    Attributes:
        u: [B] float64, the draw in [0, 1).
        ids: [B] int32, the token to store.
        source: [B] int32, the row of the step before whose token it is instead, or -1.
        positions: [B] int32, the token's place in its row; -1: an empty row.
        slots: [B] int32.
        counted: [B] int32, the slot where penalties act and tokens are counted, else -1.
        top_k: [B] int32, 0: all.
        temperature, top_p, min_p, repetition, presence, frequency: [B] float32; temperature 0 is greedy.
        tables: [B, P] int32, page numbers.
        buffer: uint8, all of it.
    """

    u: Tensor
    ids: Tensor
    source: Tensor
    positions: Tensor
    slots: Tensor
    counted: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    tables: Tensor
    buffer: Tensor

    @classmethod
    def allocate(cls, rows: int, pages: int, device: torch.device, *, pinned: bool = False) -> Inputs:
        """For `rows` empty rows of up to `pages` pages; on the host `pinned` for copies that nobody waits for."""
        shapes = {field.name: ((rows, pages) if field.name == "tables" else (rows,)) for field in fields(cls)[:-1]}
        places, end = {}, 0
        for name, shape in shapes.items():
            places[name] = end
            size = torch.Size(shape).numel() * _dtype(name).itemsize
            end += -(-size // _ALIGN) * _ALIGN
        buffer = torch.zeros(end, dtype=torch.uint8, device=device, pin_memory=pinned)
        views = {}
        for name, shape in shapes.items():
            dtype = _dtype(name)
            size = torch.Size(shape).numel() * dtype.itemsize
            views[name] = buffer[places[name] : places[name] + size].view(dtype).view(shape)
        views["positions"].fill_(EMPTY)
        views["source"].fill_(-1)
        views["counted"].fill_(-1)
        return cls(**views, buffer=buffer)


def _dtype(name: str) -> torch.dtype:
    if name == "u":
        return torch.float64
    floats = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
    return torch.float32 if name in floats else torch.int32
