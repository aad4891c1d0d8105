"""How four and eight bits lie in memory: the logical form, the files' forms, the kernels' form. Known only here.

    QuantTensor   one code a byte: what algorithms and tests work on
    GPTQ          int32 words [K/8, N] (4 bits) or [K/4, N] (8 bits), zero points stored less one: AutoGPTQ's v1 files
    GGUF          blocks of 32 columns: Q4_0, Q4_1, Q8_0
    Tiles         what the kernels read: 16 rows of the weight side by side, one word of each after the other, so that a
                  64-byte load holds 8 (4 bits) or 4 (8 bits) columns of 16 outputs and no sum crosses lanes; floats too

A word is the same in GPTQ and in tiles, column 8j + i in bits 4i to 4i + 3, so repacking only moves 64-byte lines.

Dimension letters: N outputs, K inputs, G = K / group_size groups, T = ceil(N / 16) tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwenlet.errors import FormatError

TILE_ROWS = 16


@dataclass(frozen=True)
class QuantTensor:
    """A linear's weight in codes: column j of row n is worth (codes[n, j] - zeros[n, g]) * scales[n, g] where
    g = j // group_size, or with `minimums` codes[n, j] * scales[n, g] + minimums[n, g]; it multiplies input column
    order[j].

    Attributes:
        bits: 4 or 8.
        group_size: columns that share a scale; it divides K.
        codes: [N, K] uint8, 0 to 2^bits - 1.
        scales: [N, G] float16.
        zeros: [N, G] uint8, 0 to 2^bits; None: 2^(bits - 1) everywhere (symmetric).
        minimums: [N, G] float16, instead of zeros.
        order: [K] int64, a permutation of the inputs (act-order); None: as they come.
    """

    bits: int
    group_size: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    minimums: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), of a linear's weight."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """[N, K] float32, columns in the inputs' own order."""
        n, k = self.shape
        codes = self.codes.view(n, -1, self.group_size).float()
        scales = self.scales.float()[..., None]
        if self.minimums is not None:
            weight = codes * scales + self.minimums.float()[..., None]
        else:
            zeros = float(1 << (self.bits - 1)) if self.zeros is None else self.zeros.float()[..., None]
            weight = (codes - zeros) * scales
        weight = weight.view(n, k)
        if self.order is None:
            return weight
        plain = torch.empty_like(weight)
        plain[:, self.order] = weight
        return plain


# ---------------------------------------------------------------------------------------------------- GPTQ


@dataclass(frozen=True)
class GPTQTensors:
    """A linear's weight as AutoGPTQ's v1 files hold it.

    Attributes:
        qweight: [K * bits / 32, N] int32.
        qzeros: [G, N * bits / 32] int32: zero points less one, along N.
        scales: [G, N] float16.
        g_idx: [K] int32: the group of each input column.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """[..., C] codes below 2^bits -> [..., C * bits / 32] int32, the first code in the lowest bits."""
    octets = codes.to(torch.uint8)
    if bits == 4:
        octets = octets[..., 0::2] | octets[..., 1::2] << 4
    # flat: what has one row may count as contiguous with strides that no wider type can take
    return octets.flatten().view(torch.int32).view(*octets.shape[:-1], -1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The way back: [..., W] int32 -> [..., W * 32 / bits] uint8; with 8 bits a view of the same memory."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


# a word of qzeros in a symmetric layer: zero points of 2^(bits - 1), stored less one
_SYMMETRIC_WORD = {4: 0x77777777, 8: 0x7F7F7F7F}


def _gptq_zeros(parts: GPTQTensors, bits: int) -> Tensor | None:
    """[N, G] uint8, or None for symmetric codes."""
    if bool((parts.qzeros == _SYMMETRIC_WORD[bits]).all()):
        return None
    return (unpack_words(parts.qzeros, bits) + 1).T


def from_gptq(parts: GPTQTensors, bits: int, group_size: int) -> QuantTensor:
    """Raises FormatError where g_idx is no arrangement of full groups."""
    codes = unpack_words(parts.qweight.T.contiguous(), bits)
    zeros = _gptq_zeros(parts, bits)
    order = gptq_order(parts.g_idx, codes.shape[1], group_size)
    return QuantTensor(
        bits,
        group_size,
        codes if order is None else codes[:, order],
        parts.scales.T.to(torch.float16).contiguous(),
        None if zeros is None else zeros.contiguous(),
        order=order,
    )


def gptq_order(g_idx: Tensor, columns: int, group_size: int) -> Tensor | None:
    """Input columns sorted by group, or None where they come in order. Raises FormatError if groups aren't full."""
    wanted = torch.arange(columns, dtype=torch.int32) // group_size
    if g_idx.shape == wanted.shape and torch.equal(g_idx.to(torch.int32), wanted):
        return None
    order = torch.argsort(g_idx, stable=True)
    if g_idx.shape != wanted.shape or not torch.equal(g_idx[order].to(torch.int32), wanted):
        raise FormatError(f"g_idx does not divide {columns} columns into full groups of {group_size}")
    return order


def to_gptq(weight: QuantTensor) -> GPTQTensors:
    """AutoGPTQ's v1 form. Raises FormatError for what it can't say: float minimums, a zero point of 0."""
    if weight.minimums is not None:
        raise FormatError("GPTQ files hold zero points, not float minimums")
    columns = weight.shape[1]
    codes, groups = weight.codes, torch.arange(columns, dtype=torch.int32) // weight.group_size
    if weight.order is not None:
        codes, g_idx = torch.empty_like(codes), torch.empty_like(groups)
        codes[:, weight.order], g_idx[weight.order] = weight.codes, groups
    else:
        g_idx = groups
    if weight.zeros is None:
        zeros = torch.full(weight.scales.shape, 1 << (weight.bits - 1), dtype=torch.uint8)
    else:
        zeros = weight.zeros
    if bool((zeros == 0).any()):
        raise FormatError("GPTQ v1 files store zero points less one and can't hold a 0")
    return GPTQTensors(
        qweight=pack_words(codes, weight.bits).T.contiguous(),
        qzeros=pack_words((zeros - 1).T.contiguous(), weight.bits),
        scales=weight.scales.T.contiguous(),
        g_idx=g_idx,
    )


# ---------------------------------------------------------------------------------------------------- GGUF

# GGML's type numbers of what we run as it is
Q4_0, Q4_1, Q8_0 = 2, 3, 8
GGUF_BLOCK = 32


def from_gguf(type_id: int, raw: Tensor) -> QuantTensor:
    """Q4_0, Q4_1 or Q8_0 without loss: raw [N, bytes of a row] uint8."""
    size = {Q4_0: 18, Q4_1: 20, Q8_0: 34}[type_id]
    blocks = raw.unflatten(-1, (-1, size))  # (N, G, size)

    def halves(at: int) -> Tensor:
        return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]

    if type_id == Q8_0:
        # signed bytes; 128 more makes them codes with a zero point of 128
        return QuantTensor(8, GGUF_BLOCK, (blocks[..., 2:] ^ 0x80).flatten(-2), halves(0))
    nibbles = blocks[..., 2 if type_id == Q4_0 else 4 :]
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-1).flatten(-2)
    return QuantTensor(4, GGUF_BLOCK, codes, halves(0), minimums=halves(2) if type_id == Q4_1 else None)


# ---------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class Tiles:
    """A weight in the kernels' order; rows beyond N are zero.

    Attributes:
        bits: of a number: 4 or 8 for codes, 16 for bfloat16 and 32 for float32, which have no groups and no scales.
        weight: [T, K * bits / 32, 16] int32, a 64-byte line of 16 rows' words after the other.
        scales: [T, G, 16] float16; zeros: the same in uint8 or None; minimums: the same in float16 or None.
        rows: N.
    """

    bits: int
    group_size: int
    rows: int
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    minimums: Tensor | None = None
    order: Tensor | None = None


def _lines(table: Tensor) -> Tensor:
    """[N, C] -> [T, C, 16], padded with zeros."""
    rows, columns = table.shape
    whole, rest = divmod(rows, TILE_ROWS)
    lines = table.new_empty(whole + bool(rest), columns, TILE_ROWS)
    lines[:whole].copy_(table[: rows - rest].unflatten(0, (whole, TILE_ROWS)).transpose(1, 2))
    if rest:
        lines[whole] = 0
        lines[whole, :, :rest] = table[rows - rest :].T
    return lines


def _rows(lines: Tensor, rows: int) -> Tensor:
    return lines.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


def to_tiles(weight: QuantTensor) -> Tiles:
    return Tiles(
        weight.bits,
        weight.group_size,
        weight.shape[0],
        _lines(pack_words(weight.codes, weight.bits)),
        _lines(weight.scales),
        None if weight.zeros is None else _lines(weight.zeros),
        None if weight.minimums is None else _lines(weight.minimums),
        weight.order,
    )


def gptq_to_tiles(
    parts: GPTQTensors, bits: int, group_size: int, words_to_lines: Callable[[Tensor], Tensor] | None = None
) -> Tiles:
    """The same as `to_tiles(from_gptq(...))`, moving whole lines where no columns are permuted.

    Args:
        words_to_lines: moves [C, N] int32 to [T, C, 16]; None: torch does.
    """
    if gptq_order(parts.g_idx, parts.g_idx.shape[0], group_size) is not None:
        return to_tiles(from_gptq(parts, bits, group_size))
    zeros = _gptq_zeros(parts, bits)
    return Tiles(
        bits,
        group_size,
        parts.qweight.shape[1],
        _lines(parts.qweight.T) if words_to_lines is None else words_to_lines(parts.qweight),
        _lines(parts.scales.to(torch.float16).T),
        None if zeros is None else _lines(zeros),
    )


_STEP_ROWS = 1024  # of a large tensor at a time, so that its codes never stand in memory as a whole


def gguf_to_tiles(type_id: int, raw: Tensor) -> Tiles:
    """The same as `to_tiles(from_gguf(...))`, a slice of the rows at a time."""
    return stack_tiles((from_gguf(type_id, piece) for piece in raw.split(_STEP_ROWS)), raw.shape[0])


def stack_tiles(pieces: Iterable[QuantTensor], rows: int) -> Tiles:
    """The tiles of `rows` rows that come in pieces of one kind, each but the last a multiple of 16 rows."""
    whole: Tiles | None = None
    count, at = -(-rows // TILE_ROWS), 0
    for piece in pieces:
        tiles = to_tiles(piece)
        if whole is None:
            room: dict[str, Any] = {n: t.new_empty(count, *t.shape[1:]) for n, t in _tables(tiles).items()}
            whole = replace(tiles, rows=rows, **room)
        for name, table in _tables(tiles).items():
            _tables(whole)[name][at : at + len(table)] = table
        at += len(tiles.weight)
    assert whole is not None, "no rows"
    return whole


def _tables(tiles: Tiles) -> dict[str, Tensor]:
    """What lies in tiles: the fields that are there."""
    named = {name: getattr(tiles, name) for name in ("weight", "scales", "zeros", "minimums")}
    return {name: table for name, table in named.items() if table is not None}


def from_tiles(tiles: Tiles) -> QuantTensor:
    return QuantTensor(
        tiles.bits,
        tiles.group_size,
        unpack_words(_rows(tiles.weight, tiles.rows), tiles.bits),
        _rows(tiles.scales, tiles.rows),
        None if tiles.zeros is None else _rows(tiles.zeros, tiles.rows),
        None if tiles.minimums is None else _rows(tiles.minimums, tiles.rows),
        tiles.order,
    )


def float_to_tiles(weight: Tensor) -> Tiles:
    """[N, K] in lines of 16 rows' words, without scales: a word is one column of float32 or two of bfloat16, of which K
    is even then."""
    assert weight.dtype in (torch.bfloat16, torch.float32), f"{weight.dtype}, expected bfloat16 or float32"
    words = weight.detach().contiguous().view(torch.int32)
    return Tiles(weight.itemsize * 8, 0, weight.shape[0], _lines(words), torch.empty(0, dtype=torch.float16))


def floats_from_tiles(tiles: Tiles) -> Tensor:
    """The way back from `float_to_tiles`: [N, K]."""
    dtype = {16: torch.bfloat16, 32: torch.float32}[tiles.bits]
    return _rows(tiles.weight, tiles.rows).view(dtype)
