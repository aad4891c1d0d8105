"""The past: where keys and values of earlier tokens live. The model calls `past.attend` and knows no more.

    NoPast      rows without a past: training, scoring, one-shot logits
    PagedPast   rows whose keys and values live in pages: generation

One cache type from the start: 64 tokens a page, per layer [page, kv_head, 64, head_dim] for K and for V (or in the
kernels' order, ops/pages.py), and a table of page numbers per row. Keys are stored rotated, so a row's NTK factor must
not change while its pages live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwenlet.config import ModelConfig
from qwenlet.ops import training_attention
from qwenlet.ops.attention import causal_attention, causal_attention_batch, causal_attention_pages
from qwenlet.ops.pages import PAGE_TOKENS as PAGE_TOKENS
from qwenlet.ops.pages import RUN_PAGES, CachePages, TiledPages, tiled_layers
from qwenlet.ops.reference import quantize_rows


@dataclass(frozen=True)
class Rows:
    """How the tokens of one forward call belong to rows: row after row, without padding.

    Attributes:
        positions: [N] int64, place of each token in its own row.
        lengths: new tokens of each row; they sum to N.
        alphas: dynamic NTK factor of each row.
        logn: whether log-n attention acts in each row, where the model has it; None: in all.
    """

    positions: Tensor
    lengths: tuple[int, ...]
    alphas: tuple[float, ...]
    logn: tuple[bool, ...] | None = None

    @classmethod
    def fresh(cls, lengths: Sequence[int], alphas: Sequence[float], device: torch.device | str = "cpu") -> Rows:
        """Rows that all begin at position 0."""
        positions = [torch.arange(length, device=device) for length in lengths]
        return cls(
            torch.cat(positions) if positions else torch.empty(0, dtype=torch.long), tuple(lengths), tuple(alphas)
        )

    @classmethod
    def single(cls, start: int, length: int, alpha: float, device: torch.device | str = "cpu") -> Rows:
        """One row that continues at position `start`."""
        return cls(torch.arange(start, start + length, device=device), (length,), (alpha,))


class Past(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Remembers k and v, and answers q from everything its row has seen.

        q [N, H, D], k and v [N, G, D], rotated, rows one after another -> [N, H, D].
        """
        ...


class NoPast:
    """Rows that begin here and leave nothing behind."""

    def __init__(self, rows: Rows) -> None:
        self.lengths = rows.lengths

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad and training_attention.takes(q, k, self.lengths):
            return training_attention.attend_rows(q, k, v, self.lengths)
        first = self.lengths[0]
        if all(length == first for length in self.lengths):
            shape = (len(self.lengths), first)
            q, k, v = (x.unflatten(0, shape) for x in (q, k, v))
            return causal_attention_batch(q, k, v).flatten(0, 1)
        parts = zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*part) for part in parts])


class PagePool:
    """All pages of all layers, allocated up front (on a CPU the system commits memory only as pages are written).

    How many hold a page is counted once for all layers.

    Attributes:
        k, v: per layer [pages, G, 64, D].
        k_scales, v_scales: per layer [pages, G, 64] float32 for int8 pages, one scale per token and head; else None.
        tiles: per layer the kernels' pages, in the place of all these.

    Args:
        dtype: a float dtype, or int8.
        tiled: for the native program; the modules read and write plain pages only.
    """

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device, *, tiled: bool = False
    ) -> None:
        shape = (pages, config.num_key_value_heads, PAGE_TOKENS, config.head_dim)
        layers = range(0 if tiled else config.num_hidden_layers)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.k_scales: list[Tensor] | None = None
        self.v_scales: list[Tensor] | None = None
        if dtype == torch.int8:
            self.k_scales = [torch.empty(shape[:3], device=device) for _ in layers]
            self.v_scales = [torch.empty(shape[:3], device=device) for _ in layers]
        self.tiles: list[TiledPages] = []
        if tiled:
            self.tiles = tiled_layers(config.num_hidden_layers, pages, shape[1], config.head_dim, dtype)
        self.dtype, self.tiled = dtype, tiled
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # taken from its end, so that used pages come before untouched ones
        self._holders = [0] * pages
        self.touched = 0  # pages that stand in memory, since they or one of their run were ever taken

    def layer(self, index: int) -> CachePages:
        scales = (None, None) if self.k_scales is None else (self.k_scales[index], self.v_scales[index])  # type: ignore[index]
        return CachePages(self.k[index], self.v[index], *scales)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def free_touched(self) -> int:
        """Free pages that stand in memory already."""
        return len(self._free) - (self.pages - self.touched)

    def take(self, count: int) -> list[int]:
        """Pages that nobody holds, now held once."""
        assert count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        run = RUN_PAGES if self.tiled else 1
        self.touched = max(self.touched, min((max(pages, default=-1) // run + 1) * run, self.pages))
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more holds each of these."""
        for page in pages:
            assert self._holders[page], f"page {page} is free"
            self._holders[page] += 1

    def holders(self, page: int) -> int:
        return self._holders[page]

    def give_back(self, pages: Sequence[int]) -> None:
        """One fewer holds each of these; the last one frees it."""
        for page in reversed(pages):
            assert self._holders[page], f"page {page} was given back twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """The content of a page, in all layers."""
        for tables in (self.k, self.v, self.k_scales or (), self.v_scales or ()):
            for table in tables:
                table[target].copy_(table[source])
        for layer in self.tiles:
            layer.copy(source, target)


def pages_for(tokens: int) -> int:
    """Pages that `tokens` tokens fill, the last one perhaps in part."""
    return -(-tokens // PAGE_TOKENS)


def neighbours(table: Sequence[int]) -> list[slice]:
    """Page numbers in order, as slices of pages that lie side by side: [4, 5, 6, 2] -> [4:7], [2:3]."""
    runs: list[slice] = []
    for page in table:
        if runs and runs[-1].stop == page:
            runs[-1] = slice(runs[-1].start, page + 1)
        else:
            runs.append(slice(page, page + 1))
    return runs


class PagedPast:
    """One forward call's view of the pool: which pages belong to each row, and how far each row has come.

    Args:
        tables: page numbers of each row, in order, enough for its past and its new tokens.
        starts: tokens each row has stored already.
    """

    def __init__(self, pool: PagePool, rows: Rows, tables: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        assert not pool.tiled, "tiled pages are the native program's"
        self.pool = pool
        self.lengths = rows.lengths
        self.starts = tuple(starts)
        for table, start, length in zip(tables, self.starts, self.lengths, strict=True):
            assert len(table) >= pages_for(start + length), f"{len(table)} pages for {start + length} tokens"
        ends = [pages_for(start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        self.runs = [neighbours(table[:end]) for table, end in zip(tables, ends, strict=True)]
        device = pool.k[0].device
        split = zip(tables, rows.positions.split(self.lengths), strict=True)
        self.page_of = torch.cat([torch.tensor(t, device=device)[p // PAGE_TOKENS] for t, p in split])
        self.slot_of = rows.positions % PAGE_TOKENS

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = self.pool.layer(layer)
        # queries see keys and values as they were stored, their own too: a row must not depend on how it was cut up
        k = _stored(k, pages.k, pages.k_scales, self.page_of, self.slot_of)
        v = _stored(v, pages.v, pages.v_scales, self.page_of, self.slot_of)
        parts = []
        offset = 0
        for start, length, runs in zip(self.starts, self.lengths, self.runs, strict=True):
            new = slice(offset, offset + length)
            if start == 0:
                parts.append(causal_attention(q[new], k[new], v[new]))
            else:
                parts.append(causal_attention_pages(q[new], pages, runs, start + length))
            offset += length
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stored(new: Tensor, pages: Tensor, scales: Tensor | None, page_of: Tensor, slot_of: Tensor) -> Tensor:
    """Puts new [N, G, D] into its slots, and gives it back as the slots hold it."""
    if scales is None:
        pages[page_of, :, slot_of] = new
        return new
    codes, each = quantize_rows(new, new.shape[-1])
    pages[page_of, :, slot_of], scales[page_of, :, slot_of] = codes, each[..., 0]
    return (codes.float() * each).to(new.dtype)
