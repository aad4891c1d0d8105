"""A folder in AutoGPTQ's v1 layout, read as the float tensors it stands for.

    X.qweight X.qzeros X.scales X.g_idx   appear as X.weight [N, K]
    X.weight (int8) and X.scales          a quantized embedding, appear as X.weight [V, C]
    anything else                         as it is

Which is which the configuration decides, and the shapes have to agree with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qwenlet.checkpoint.files import SafetensorsFiles, Shards
from qwenlet.checkpoint.names import Part
from qwenlet.config import QuantConfig
from qwenlet.errors import FormatError
from qwenlet.linear import QuantEmbedding
from qwenlet.ops import cpu
from qwenlet.ops.packing import GPTQTensors, QuantTensor, Tiles, from_gptq, gptq_order, gptq_to_tiles, stack_tiles

_LEAVES = ("qweight", "qzeros", "scales", "g_idx")
_DAMAGED = "the file is damaged, or its quantization_config belongs to another checkpoint"
_SLICE_ROWS = 4096  # of a weight that is dequantized at a time; a multiple of every packing


class GPTQFile:
    """`files` with its quantized tensors read as floats, or as tiles.

    Raises:
        FormatError: the tensors of a quantized layer are not complete, or not of the shapes that `quant` promises;
            or the other way round, a layer is quantized of which `quant` says nothing.
    """

    def __init__(self, files: Shards, quant: QuantConfig) -> None:
        self.files, self.quant = files, quant
        held: dict[str, set[str]] = {}
        for name in files.names():
            stem, _, leaf = name.rpartition(".")
            held.setdefault(stem, set()).add(leaf)
        self._linears = {
            stem: self._linear_shape(stem, leaves)
            for stem, leaves in held.items()
            if leaves & {"qweight", "qzeros", "g_idx"}
        }
        self._embeddings = {
            stem: self._check_embedding(stem)
            for stem, leaves in held.items()
            if {"weight", "scales"} <= leaves and stem not in self._linears
        }
        if quant.embedding_bits is not None and not self._embeddings:
            raise FormatError(
                f"the configuration says embedding_bits {quant.embedding_bits}, but no embedding has scales",
                hint=_DAMAGED,
            )

    # ---------------------------------------------------------------------------------------------- as floats

    def names(self) -> Iterator[str]:
        for name in self.files.names():
            stem, _, leaf = name.rpartition(".")
            if stem in self._linears and leaf in _LEAVES:
                if leaf == "qweight":
                    yield f"{stem}.weight"
            elif stem not in self._embeddings or leaf != "scales":
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._linears.get(_stem(name)) or self.files.shape(name) if _is_weight(name) else self.files.shape(name)

    def stored_dtype(self, name: str) -> torch.dtype | None:
        if _is_weight(name) and (_stem(name) in self._linears or _stem(name) in self._embeddings):
            return None
        return self.files.stored_dtype(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        stem = _stem(name)
        if not _is_weight(name) or not (stem in self._linears or stem in self._embeddings):
            return self.files.read(name, dtype)
        out = torch.empty(self.shape(name), dtype=dtype)
        at = 0
        for piece in self._pieces(stem):
            out[at : at + piece.shape[0]] = piece.dequantize()
            at += piece.shape[0]
        return out

    # ---------------------------------------------------------------------------------------------- as stored

    def is_linear(self, parts: Sequence[Part]) -> bool:
        """Whether all of these are quantized linears."""
        return all(_stem(part.name) in self._linears for part in parts)

    def gptq_tensors(self, parts: Sequence[Part]) -> GPTQTensors | None:
        """The parts' rows one after the other, or None where one isn't quantized or they don't share their groups."""
        stems = [_stem(part.name) for part in parts]
        if not self.is_linear(parts):
            return None
        each = [self._read_linear(stem) for stem in stems]
        if len(each) == 1:
            return each[0]
        if any(not torch.equal(one.g_idx, each[0].g_idx) for one in each):
            return None
        return GPTQTensors(
            qweight=torch.cat([one.qweight for one in each], dim=1),
            qzeros=torch.cat([one.qzeros for one in each], dim=1),
            scales=torch.cat([one.scales for one in each], dim=1),
            g_idx=each[0].g_idx,
        )

    def read_tiles(self, parts: Sequence[Part]) -> Tiles | None:
        stem = _stem(parts[0].name)
        if len(parts) == 1 and stem in self._embeddings:  # a tied head
            return stack_tiles(self._pieces(stem), parts[0].rows)
        tensors = self.gptq_tensors(parts)
        return (
            None
            if tensors is None
            else gptq_to_tiles(tensors, *self._kind(stem), cpu.words_to_lines if cpu.available() else None)
        )

    def read_embedding(self, name: str, dtype: torch.dtype) -> nn.Module | None:
        stem = _stem(name)
        if stem not in self._embeddings:
            return self.files.read_embedding(name, dtype)
        codes, scales = self._stored(name, torch.int8), self._stored(f"{stem}.scales", torch.float16)
        rows = self.files.rows(name, f"{stem}.scales") if isinstance(self.files, SafetensorsFiles) else None
        return QuantEmbedding(codes, scales, dtype, rows)

    # ---------------------------------------------------------------------------------------------- inside

    def _kind(self, stem: str) -> tuple[int, int]:
        """Bits and group size of a linear. Raises FormatError if the configuration doesn't know it as quantized."""
        bits, group_size = self.quant.of_linear(stem) or (None, None)
        if bits is None or group_size is None:
            raise FormatError(f"{stem} is quantized, but its quantization_config does not say so", hint=_DAMAGED)
        return bits, group_size

    def _linear_shape(self, stem: str, leaves: set[str]) -> tuple[int, int]:
        """(N, K), from shapes that agree with each other and with the configuration."""
        if missing := [leaf for leaf in _LEAVES if leaf not in leaves]:
            raise FormatError(f"{stem} lacks {', '.join(missing)}", hint=_DAMAGED)
        bits, group_size = self._kind(stem)
        seen = {leaf: self.files.shape(f"{stem}.{leaf}") for leaf in _LEAVES}
        if len(seen["qweight"]) == 2 and len(seen["scales"]) == 2:
            columns, rows = seen["qweight"][0] * 32 // bits, seen["scales"][1]
            groups = columns // group_size
            expected = {
                "qweight": (columns * bits // 32, rows),
                "qzeros": (groups, rows * bits // 32),
                "scales": (groups, rows),
                "g_idx": (columns,),
            }
            if seen == expected and columns % group_size == 0 and rows * bits % 32 == 0:
                return rows, columns
        shapes = ", ".join(f"{leaf} {list(shape)}" for leaf, shape in seen.items())
        raise FormatError(f"{stem} has {shapes}, which is not {bits} bits in groups of {group_size}", hint=_DAMAGED)

    def _check_embedding(self, stem: str) -> str:
        if self.quant.embedding_bits is None:
            raise FormatError(f"{stem} has scales, but its quantization_config names no embedding_bits", hint=_DAMAGED)
        codes, scales = self.files.shape(f"{stem}.weight"), self.files.shape(f"{stem}.scales")
        if len(codes) != 2 or len(scales) != 2 or codes[0] != scales[0] or not scales[1] or codes[1] % scales[1]:
            raise FormatError(f"{stem} has codes {list(codes)} and scales {list(scales)}", hint=_DAMAGED)
        return stem

    def _stored(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.files.stored(name)
        if tensor.dtype != dtype:
            raise FormatError(
                f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, "
                f"expected {str(dtype).removeprefix('torch.')}",
                hint=_DAMAGED,
            )
        return tensor

    def _read_linear(self, stem: str) -> GPTQTensors:
        """Raises FormatError for a foreign dtype, or groups that are not full."""
        tensors = GPTQTensors(
            qweight=self._stored(f"{stem}.qweight", torch.int32),
            qzeros=self._stored(f"{stem}.qzeros", torch.int32),
            scales=self.files.read(f"{stem}.scales", torch.float16),
            g_idx=self._stored(f"{stem}.g_idx", torch.int32),
        )
        try:
            gptq_order(tensors.g_idx, len(tensors.g_idx), self._kind(stem)[1])
        except FormatError as error:
            raise FormatError(f"{stem}: {error.message}", hint=_DAMAGED) from None
        # a float32 sum of float16 numbers is finite unless one of them isn't, and takes a tenth of the time of isfinite
        if not bool(tensors.scales.sum(dtype=torch.float32).isfinite()):
            raise FormatError(f"{stem}.scales holds numbers that are not finite in float16", hint=_DAMAGED)
        return tensors

    def _pieces(self, stem: str) -> Iterator[QuantTensor]:
        """A quantized weight in slices of its rows."""
        if stem in self._embeddings:
            codes, scales = self._stored(f"{stem}.weight", torch.int8), self._stored(f"{stem}.scales", torch.float16)
            group_size = codes.shape[1] // scales.shape[1]
            for piece, scale in zip(codes.split(_SLICE_ROWS), scales.split(_SLICE_ROWS), strict=True):
                # signed bytes; 128 more makes them codes with a zero point of 128
                yield QuantTensor(8, group_size, piece.view(torch.uint8) ^ 0x80, scale)
            return
        bits, group_size = self._kind(stem)
        tensors = self._read_linear(stem)
        for at in range(0, tensors.qweight.shape[1], _SLICE_ROWS):
            rows, packed = slice(at, at + _SLICE_ROWS), slice(at * bits // 32, (at + _SLICE_ROWS) * bits // 32)
            piece = GPTQTensors(
                tensors.qweight[:, rows], tensors.qzeros[:, packed], tensors.scales[:, rows], tensors.g_idx
            )
            yield from_gptq(piece, bits, group_size)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _is_weight(name: str) -> bool:
    return name.endswith(".weight")
