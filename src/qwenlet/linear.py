"""Linears in the form their kernel wants, and the walk that swaps them in.

    StreamedLinear    our own kernels: weights row by row as published, streamed for a few rows
    TiledLinear       our own kernels: sixteen outputs side by side, for any number of rows
    PrepackedLinear   oneDNN's blocked order, a copy made once: where the package was built without kernels
    QuantLinear       four or eight bits a weight, in the kernels' tiles
    QuantEmbedding    eight bits a weight, read in place
    MappedEmbedding   a table in any other form, read in place

A decoded token reads every weight once, so the order in memory and the loads decide the speed. One row of 2048 x 5504
on two cores of a Zen 4: `F.linear` 12 GB/s, prepacked 16, streamed 20-28 (dev/LOG.md, 2026-11-22).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenlet.errors import ConfigError
from qwenlet.ops import cpu, replay, triton
from qwenlet.ops.packing import TILE_ROWS, QuantTensor, Tiles, float_to_tiles, from_tiles

# Rows oneDNN is told to expect when it chooses the blocked order. 16 measured best for one row and no worse for many.
_ROWS_HINT = 16
BF16_COLUMNS = 16  # inputs of a TiledLinear in bfloat16 are a multiple of these; in float32 any number will do


class StreamedLinear(nn.Module):
    """y = x W^T + b by `ops.cpu.linear_bf16`, with W [out, in] in memory of its own:
    many rows over the pages of a mapped file ran at 0.82 of the speed."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in] bfloat16 -> [N, out]."""
        return cpu.linear_bf16(x, self.weight, self.bias)


class PrepackedLinear(nn.Module):
    """y = x W^T + b with W [out, in] in oneDNN's own order. Inference only; `unpack` gives the plain weight back."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in] bfloat16 -> [N, out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def unpack(self) -> Tensor:
        return self.packed.to_dense()


class TiledLinear(nn.Module):
    """y = x W^T + b with W [out, in] bfloat16 or float32 in the kernels' tiles: streamed for a few rows, in blocks for
    many. Inference only.

    A row's result is the same bits whatever the rows beside it.
    """

    def __init__(self, weight: Tensor | Tiles, bias: Tensor | None) -> None:
        super().__init__()
        self.tiles = float_to_tiles(weight) if isinstance(weight, Tensor) else weight
        self.out_features, self.in_features = self.tiles.rows, self.tiles.weight.shape[1] * 32 // self.tiles.bits
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """x [M, in] -> [M, out] in x's dtype; x rounded to bfloat16 if the weight is, sums in float32."""
        return frozen_linear(x, self.tiles, self.bias)


class QuantLinear(nn.Module):
    """y = x W^T + b with W [out, in] in codes of 4 or 8 bits. Inference only; `unpack` gives the codes back.

    Attributes:
        tiles: the weight as the kernels read it, on a CPU or a GPU; bias: [out] float32 or None.
    """

    def __init__(self, tiles: Tiles, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features = tiles.rows
        self.in_features = tiles.weight.shape[1] * 32 // tiles.bits
        self.tiles = tiles
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """x [M, in] -> [M, out] in x's dtype; sums in float32."""
        return frozen_linear(x, self.tiles, self.bias)

    def unpack(self) -> QuantTensor:
        return from_tiles(self.tiles)


class _Frozen(torch.autograd.Function):
    """A linear by the kernels whose weight gets no gradient: forward as in generation, so that what is trained is what
    will run; backward through the weight as it is worth, some columns at a time, never as a whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
        ctx.tiles = tiles
        return replay.once(lambda: product(x, tiles, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return tiles_back(grads[0], ctx.tiles), None, None


def tiles_back(grad: Tensor, tiles: Tiles) -> Tensor:
    """grad W: [M, out] -> [M, in] in grad's dtype."""
    if not _on_gpu(tiles):
        return cpu.linear_back(grad, tiles)
    back = None
    for begin, piece in _pieces(tiles):
        part = grad[:, begin : begin + piece.rows] @ _dequantize(piece, grad.dtype)
        back = part if back is None else back.add_(part)
    assert back is not None, "a weight has rows"
    return back


def _on_gpu(tiles: Tiles) -> bool:
    return tiles.weight.is_cuda


_PIECE_ROWS = 8192  # outputs whose weights stand in floats at a time on a GPU: a head has 150,000


def _pieces(tiles: Tiles) -> Iterator[tuple[int, Tiles]]:
    """(first output, the tiles of some outputs)."""
    step = _PIECE_ROWS // TILE_ROWS
    for at in range(0, len(tiles.weight), step):
        of = {name: getattr(tiles, name) for name in ("weight", "scales", "zeros", "minimums")}
        cut: dict[str, Any] = {name: None if part is None else part[at : at + step] for name, part in of.items()}
        begin = at * TILE_ROWS
        yield begin, replace(tiles, **cut, rows=min(tiles.rows - begin, _PIECE_ROWS))


class _Linear(torch.autograd.Function):
    """x W^T + b whose result a tape may keep. x [M, in], W [out, in], b [out] or None, of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return replay.once(lambda: F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g, (of_x, of_weight, of_bias) = grads[0], ctx.needs_input_grad
        return (
            cpu.rows_back(g, weight) if of_x else None,
            g.t() @ x if of_weight else None,
            g.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for x [..., in] -> [..., out], autocast as that, kept by the tape that is on (ops/replay.py)."""
    dtype = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    y = _Linear.apply(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.view(*x.shape[:-1], len(weight))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a product with x is computed in: autocast's dtype where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def product(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    """Where the weight lies: on a CPU with x in codes too, on a GPU in x's own precision."""
    if not _on_gpu(tiles):
        return cpu.linear_quant(x, tiles, bias)
    if len(x) == 1 and triton.status().runs:
        from qwenlet.ops.triton.linear import linear

        return linear(x, tiles, bias)
    added = None if bias is None else bias.to(x.dtype)
    if tiles.rows <= _PIECE_ROWS:
        return F.linear(x, _dequantize(tiles, x.dtype), added)
    y = x.new_empty(len(x), tiles.rows)
    for begin, piece in _pieces(tiles):
        y[:, begin : begin + piece.rows] = F.linear(x, _dequantize(piece, x.dtype))
    return y if added is None else y.add_(added)


def _dequantize(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """[N, K] on a GPU, by Triton's kernel or, without it, as its definition says."""
    if triton.status().runs:
        from qwenlet.ops.triton.linear import dequantize

        return dequantize(tiles, dtype)
    order = None if tiles.order is None else tiles.order.long()
    return from_tiles(replace(tiles, order=order)).dequantize().to(dtype)


def frozen_linear(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [..., in] -> [..., out] in x's dtype, with a gradient for x where one is wanted."""
    rows = x.reshape(-1, x.shape[-1])
    wanted = torch.is_grad_enabled() and x.requires_grad
    y = _Frozen.apply(rows, tiles, bias) if wanted else product(rows, tiles, bias)
    return y.view(*x.shape[:-1], tiles.rows)


def on_device(tiles: Tiles, device: torch.device) -> Tiles:
    """The same weight where a GPU's kernels read it; the columns' order becomes int32."""
    named = {name: getattr(tiles, name) for name in ("weight", "scales", "zeros", "minimums")}
    moved: dict[str, Any] = {name: None if part is None else part.to(device) for name, part in named.items()}
    order = None if tiles.order is None else tiles.order.to(device, torch.int32)
    return replace(tiles, **moved, order=order)


def float_weight(linear: nn.Module) -> Tensor:
    """A linear's weight [out, in] in floats of memory of its own: as it is, or what its codes are worth in float32."""
    tiles = getattr(linear, "tiles", None)
    if isinstance(tiles, Tiles):
        if _on_gpu(tiles):
            return _dequantize(tiles, torch.float32)
        return cpu.tiles_to_float(tiles, torch.bfloat16 if tiles.bits == 16 else torch.float32)
    assert isinstance(linear.weight, Tensor), f"{type(linear).__name__} has no weight in floats"
    return linear.weight.detach().clone()


class QuantEmbedding(nn.Module):
    """Rows of a table in eight bits: entry j of row v is worth codes[v, j] * scales[v, j // group].

    Attributes:
        codes: [V, C] int8; scales: [V, C / group] float16. Both may be strided views of a mapped file, of which only
            the rows that are asked for are ever read.
        rows: reads codes and scales of some rows [N] from their file, so that nothing of it is mapped; None: they are
            taken from the tensors.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        dtype: torch.dtype = torch.float32,
        rows: Callable[[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape[0], codes.shape[1:].numel()
        self.codes, self.scales, self.dtype, self.rows = codes, scales, dtype, rows

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N] int64 -> [N, C]."""
        codes, scales = (self.codes[ids], self.scales[ids]) if self.rows is None else self.rows(ids)
        groups = codes.reshape(len(ids), self.scales.shape[1], -1)
        return (groups * scales.float()[..., None]).flatten(1).to(self.dtype)


class MappedEmbedding(nn.Module):
    """Rows of a table that stays as its file holds it, of which only those asked for are read and converted.

    Attributes:
        rows: [V, ...], as stored; unpack: turns some of them into floats [N, C].
    """

    def __init__(self, rows: Tensor, unpack: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rows, self.unpack, self.dtype = rows, unpack, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N] int64 -> [N, C]."""
        return self.unpack(self.rows[ids]).to(self.dtype)


@lru_cache(maxsize=1)
def prepack_works() -> tuple[bool, str]:
    """Whether this torch and this processor can prepack bfloat16 linears, and why (not)."""
    if not torch.backends.mkldnn.is_available():
        return False, "this torch was built without oneDNN"
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False, "oneDNN has no bfloat16 kernels for this processor"
        probe = torch.ones(64, 64, dtype=torch.bfloat16)
        PrepackedLinear(probe, None)(probe[:1])
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return False, f"this torch lacks oneDNN's prepacked linear ({str(error).splitlines()[0]})"
    return True, "oneDNN keeps bfloat16 weights in blocked order"


Kind = type[TiledLinear] | type[StreamedLinear] | type[PrepackedLinear] | None


def choose_linear(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[Kind, str]:
    """Which class runs the linears (None: torch's own), and why.

    Args:
        asked: "auto", or by name "tiled", "streamed", "prepacked", "torch".
    Raises:
        ConfigError: what was asked for does not run here.
    """
    if asked == "torch":
        return None, "asked for"
    takes = (torch.bfloat16, torch.float32) if asked in ("auto", "tiled") else (torch.bfloat16,)
    if device.type != "cpu" or dtype not in takes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in takes)
        if asked == "auto":
            return None, f"other kernels are for {names} on a CPU"
        raise ConfigError(
            f"linear={asked!r} is for {names} on a CPU, not {dtype} on {device}", hint="use linear='auto'"
        )
    kernels = cpu.status()
    if asked == "auto" and dtype == torch.float32 and kernels.isa in (None, "portable"):
        why = kernels.reason if kernels.isa is None else "prefill by plain C++ takes two to three times as long"
        return None, why
    if asked in ("auto", "tiled", "streamed") and kernels.isa is not None:
        kind = StreamedLinear if asked == "streamed" else TiledLinear
        return kind, f"{kernels.isa} kernels, {kernels.reason}"
    if asked in ("tiled", "streamed"):
        raise ConfigError(f"linear={asked!r} has no kernels here: {kernels.reason}", hint="use linear='auto'")
    packs, packs_why = prepack_works()  # takes 0.2 s, a third of some loads
    if packs:
        return PrepackedLinear, packs_why
    if asked == "prepacked":
        raise ConfigError(f"linear='prepacked' does not run here: {packs_why}", hint="use linear='auto'")
    return None, packs_why


def new_linear(kind: Kind, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear of this kind, or of the next one where the weight's shape doesn't suit it."""
    assert kind is not None, "torch's own linear needs no swap"
    if kind is TiledLinear and weight.dtype == torch.bfloat16 and weight.shape[1] % BF16_COLUMNS:
        kind = StreamedLinear
    return kind(weight, bias)


def replace_linear(root: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where the dotted `name` stands under `root`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
