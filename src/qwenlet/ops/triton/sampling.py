"""From logits to tokens on the device, without waiting for them: what qwenlet.sampling defines, for all rows at once.

Nothing is sorted. A token weighs exp((logit - largest) / temperature), at most 1, as a whole number of 2^-40; sums of
whole numbers don't depend on their order, so neither does a token. The bits of a float above 0 are in the order of the
floats, so a histogram over their upper bits shows in which bin the border of top-k or top-p lies, and halving steps
inside that bin find the border itself. Weights below 2^-40 of the largest count as 0.

    1  _penalize   logits with penalties, the largest of each block        a program per row and block
    2  _weigh      weights, and their histogram                            a program per row and block
    3  _choose     borders, the draw, and counting what was drawn          a program per row

Dimension letters: B rows, V vocabulary, S tables of counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenlet.ops.triton.interpreter import repair

_BLOCK = 2048  # tokens of a program that goes over the vocabulary with others
_WIDE = 8192  # tokens that a program takes at a time when it goes over all of them alone
_PIECE = 1024  # tokens among which the draw looks for its own
_BINS = 4096
# of a weight's bits: what a bin does not look at, and the bin of 2^-41
_FINE, _LOWEST = tl.constexpr(17), tl.constexpr(86 << 6)
_UNIT = tl.constexpr(float(1 << 40))


@dataclass(frozen=True)
class Settings:
    """What each row asks for, as tensors on the device that a step reads in place.

    Attributes:
        temperature: [B] float32, 0 for greedy; top_p: [B] float32, 1 for all; min_p: [B] float32; top_k: [B] int32, 0
            for all.
        repetition, presence, frequency: [B] float32, penalties.
        u: [B] float64 in [0, 1), `sampling.uniform` of the row's seed, choice and position.
        slots: [B] int32, the row of `counts` that belongs to it; -1: no penalties, nothing is counted.
        counts: [S, V] int32: -1 for tokens never seen, else how often each stands in the reply (0: in the prompt only).
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    u: Tensor
    slots: Tensor
    counts: Tensor

    @classmethod
    def greedy(cls, rows: int, vocabulary: int, device: torch.device | str, *, tables: int = 1) -> Settings:
        """Greedy in all rows, without penalties; fill in what differs."""

        def filled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        return cls(
            temperature=filled(0.0),
            top_p=filled(1.0),
            min_p=filled(0.0),
            top_k=filled(0, torch.int32),
            repetition=filled(1.0),
            presence=filled(0.0),
            frequency=filled(0.0),
            u=filled(0.0, torch.float64),
            slots=filled(-1, torch.int32),
            counts=torch.full((tables, vocabulary), -1, dtype=torch.int32, device=device),
        )


class SampleScratch:
    """Memory that `sample` works in, 12 bytes a row and token of the vocabulary; whatever is in it.

    Attributes:
        weights: [B, V] float32; peaks, places: [B, blocks] largest logits and their tokens.
        mass: [B, bins] int64 and many: [B, bins] int32, the histogram.
        keys, tokens: [B, V] int32, the weights' bits and the tokens of one bin; cursors: [B] int32, how many.
        pieces: [B, pieces] int64, masses of neighbouring tokens.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device | str) -> None:
        def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        self.rows, self.vocabulary = rows, vocabulary
        blocks = -(-vocabulary // _BLOCK)
        self.weights, self.peaks = room(vocabulary, dtype=torch.float32), room(blocks, dtype=torch.float32)
        self.places = room(blocks)
        self.mass, self.many = room(_BINS, dtype=torch.int64), room(_BINS)
        self.keys, self.tokens, self.cursors = room(vocabulary), room(vocabulary), room()
        self.pieces = room(-(-vocabulary // _WIDE) * (_WIDE // _PIECE), dtype=torch.int64)


def sample(logits: Tensor, settings: Settings, scratch: SampleScratch, *, out: Tensor | None = None) -> Tensor:
    """A token of each row, counted in its table.

    Penalties, temperature, top-k, top-p, min-p and the draw are `sampling.choose`'s.

    Args:
        logits: [B, V] of any float dtype.
        out: [B] int32, written to.
    Returns:
        [B] int32; -1 where the largest logit is not finite.
    """
    repair()
    rows, vocabulary = logits.shape
    assert rows <= scratch.rows, f"{rows} rows, scratch is for {scratch.rows}"
    assert vocabulary < 1 << 20, f"{vocabulary} tokens are too many"
    assert vocabulary == scratch.vocabulary, f"{vocabulary} logits, scratch is for {scratch.vocabulary}"
    assert logits.is_contiguous(), f"logits have strides {logits.stride()}"
    if out is None:
        out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    s, r = settings, scratch
    blocks = r.peaks.shape[1]
    _penalize[(rows, blocks)](
        logits, s.temperature, s.repetition, s.presence, s.frequency, s.slots, s.counts,
        r.weights, r.peaks, r.places, r.mass, r.many, vocabulary, blocks, BLOCK=_BLOCK, BINS=_BINS, num_warps=4,
    )  # fmt: skip
    padded = 1 << (blocks - 1).bit_length()
    _weigh[(rows, blocks)](
        s.temperature, r.weights, r.peaks, r.mass, r.many, vocabulary, blocks,
        BLOCKS=padded, BLOCK=_BLOCK, BINS=_BINS, num_warps=4,
    )  # fmt: skip
    pieces = r.pieces.shape[1]
    _choose[(rows,)](
        s.temperature, s.top_p, s.min_p, s.top_k, s.u, s.slots, s.counts, r.weights, r.peaks, r.places, r.mass, r.many,
        r.keys, r.tokens, r.cursors, r.pieces, out, vocabulary, blocks, pieces,
        BLOCKS=padded, WIDE=_WIDE, PIECE=_PIECE, PIECES=1 << (pieces - 1).bit_length(), BINS=_BINS, num_warps=16,
    )  # fmt: skip
    return out


@triton.jit
def _penalize(
    logits, temperature, repetition, presence, frequency, slots, counts, weights, peaks, places, mass, many,
    V, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    keep = token < V
    wide_row = row.to(tl.int64)
    x = tl.load(logits + wide_row * V + token, mask=keep, other=-float("inf")).to(tl.float32)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        seen = tl.load(counts + slot * V + token, mask=keep, other=-1)
        factor = tl.load(repetition + row)
        punished = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + factor), x * factor)
        x = tl.where(seen >= 0, punished, x)
        x = tl.where(seen > 0, x - (tl.load(presence + row) + tl.load(frequency + row) * seen.to(tl.float32)), x)
    # what is no number must not be passed over: it becomes the largest
    peak, place = tl.max(tl.where(x == x, x, float("inf")), 0, return_indices=True)
    tl.store(peaks + row * blocks + block, peak)
    tl.store(places + row * blocks + block, block * BLOCK + place)
    if tl.load(temperature + row) > 0:
        tl.store(weights + wide_row * V + token, x, mask=keep)
        bin = tl.arange(0, BINS)
        mine = bin % blocks == block
        tl.store(mass + row * BINS + bin, tl.zeros((BINS,), tl.int64), mask=mine)
        tl.store(many + row * BINS + bin, tl.zeros((BINS,), tl.int32), mask=mine)


@triton.jit
def _finite(peak):
    return (peak > -1e30) & (peak < float("inf"))


@triton.jit
def _whole(weight):
    return (weight * _UNIT).to(tl.int64)


@triton.jit
def _weigh(
    temperature, weights, peaks, mass, many, V, blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    each = tl.arange(0, BLOCKS)
    peak = tl.max(tl.load(peaks + row * blocks + each, mask=each < blocks, other=-float("inf")), 0)
    if (heat > 0) & _finite(peak):
        token = block * BLOCK + tl.arange(0, BLOCK)
        keep = token < V
        at = weights + row.to(tl.int64) * V + token
        x = tl.load(at, mask=keep, other=-float("inf"))
        weight = tl.exp((x - peak) / heat)
        tl.store(at, weight, mask=keep)
        amount = _whole(weight)
        bin = (weight.to(tl.int32, bitcast=True) >> _FINE) - _LOWEST
        alive = keep & (amount > 0)
        tl.atomic_add(mass + row * BINS + bin, amount, mask=alive, sem="relaxed")
        tl.atomic_add(many + row * BINS + bin, tl.full((BLOCK,), 1, tl.int32), mask=alive, sem="relaxed")


@triton.jit
def _gather(weights, keys, tokens, cursor, bin, V, WIDE: tl.constexpr):
    """Tokens of one bin and their weights' bits, in any order; how many."""
    tl.store(cursor, 0)
    tl.debug_barrier()
    for start in tl.range(0, V, WIDE):
        token = start + tl.arange(0, WIDE)
        key = tl.load(weights + token, mask=token < V, other=0.0).to(tl.int32, bitcast=True)
        found = (key >> _FINE) - _LOWEST == bin
        at = tl.atomic_add(cursor + tl.zeros_like(token), 1, mask=found, sem="relaxed")
        tl.store(keys + at, key, mask=found)
        tl.store(tokens + at, token, mask=found)
    tl.debug_barrier()
    return tl.load(cursor)


@triton.jit
def _from(keys, count, least, MASS: tl.constexpr, STEP: tl.constexpr):
    """How many of the keys are `least` or more, or with MASS how much they weigh."""
    total = tl.zeros((STEP,), tl.int64)
    for start in tl.range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        key = tl.load(keys + i, mask=i < count, other=0)
        one = tl.full((STEP,), 1, tl.int64)
        if MASS:
            one = _whole(key.to(tl.float32, bitcast=True))
        total += tl.where((i < count) & (key >= least), one, 0)
    return tl.sum(total, 0)


@triton.jit
def _border(keys, count, bin, wanted, MASS: tl.constexpr, STEP: tl.constexpr):
    """The largest key from which on there are `wanted` of the bin's tokens, or that much weight."""
    border = (bin + _LOWEST) << _FINE
    half = 1 << 16  # of a bin's keys
    for _ in tl.range(0, _FINE):
        if _from(keys, count, border + half, MASS, STEP) >= wanted:
            border += half
        half = half // 2
    return border


@triton.jit
def _last_tie(keys, tokens, count, border, wanted, STEP: tl.constexpr):
    """The token up to which there are `wanted` with this very key."""
    last, half = 0, 1 << 19  # of as many ids as there may be
    for _ in tl.range(0, 20):
        further = last + half
        total = tl.zeros((STEP,), tl.int32)
        for start in tl.range(0, count, STEP):
            at = start + tl.arange(0, STEP)
            same = (at < count) & (tl.load(keys + at, mask=at < count, other=-1) == border)
            total += (same & (tl.load(tokens + at, mask=at < count, other=0) < further)).to(tl.int32)
        if tl.sum(total, 0) < wanted:
            last = further
        half = half // 2
    return last


@triton.jit
def _choose(
    temperature, top_p, min_p, top_k, u, slots, counts, weights, peaks, places, mass, many,
    keys, tokens, cursors, pieces, out, V, blocks, piece_count,
    BLOCKS: tl.constexpr, WIDE: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = 4096
    row = tl.program_id(0)
    each = tl.arange(0, BLOCKS)
    tops = tl.load(peaks + row * blocks + each, mask=each < blocks, other=-float("inf"))
    peak, first = tl.max(tops, 0, return_indices=True)
    chosen = tl.load(places + row * blocks + first)
    if not _finite(peak):
        chosen = -1
    elif tl.load(temperature + row) > 0:
        # 1. bins, from the heaviest on
        weights += row.to(tl.int64) * V
        keys += row.to(tl.int64) * V
        tokens += row.to(tl.int64) * V
        cursor = cursors + row
        step = tl.arange(0, BINS)
        amounts = tl.load(mass + row * BINS + (BINS - 1) - step)
        sums = tl.cumsum(amounts, 0)
        total = tl.sum(amounts, 0)
        border, last_tie = 0, V
        held, count = -1, 0

        # 2. top-k: everything from the k-th heaviest weight on
        k = tl.load(top_k + row)
        numbers = tl.load(many + row * BINS + (BINS - 1) - step)
        if (k > 0) & (tl.sum(numbers, 0) > k):
            behind = tl.cumsum(numbers, 0)
            at = tl.sum((behind < k).to(tl.int32), 0)
            before = tl.sum(tl.where(step < at, numbers, 0), 0)
            held = BINS - 1 - at
            count = _gather(weights, keys, tokens, cursor, held, V, WIDE)
            border = _border(keys, count, held, (k - before).to(tl.int64), False, STEP)
            total = tl.sum(tl.where(step < at, amounts, 0), 0) + _from(keys, count, border, True, STEP)

        # 3. top-p: the heaviest that together reach its share of what top-k left; of equals the first ids
        p = tl.load(top_p + row)
        if p < 1:
            share = p.to(tl.float64) * total.to(tl.float64)
            wanted = share.to(tl.int64)
            wanted += (wanted.to(tl.float64) < share).to(tl.int64)
            wanted = tl.minimum(tl.maximum(wanted, 1), total)
            at = tl.sum((sums < wanted).to(tl.int32), 0)
            before = tl.sum(tl.where(step < at, amounts, 0), 0)
            if held != BINS - 1 - at:
                held = BINS - 1 - at
                count = _gather(weights, keys, tokens, cursor, held, V, WIDE)
            border = _border(keys, count, held, wanted - before, True, STEP)
            heavier = before + _from(keys, count, border + 1, True, STEP)
            single = _whole(border.to(tl.float32, bitcast=True))
            ties = (wanted - heavier + single - 1) // single
            last_tie = _last_tie(keys, tokens, count, border, ties, STEP)

        # 4. what is left, piece by piece
        least = tl.load(min_p + row)
        for start in tl.range(0, V, WIDE):
            token = start + tl.arange(0, WIDE)
            left = _left(weights, token, V, border, last_tie, least)
            summed = tl.sum(tl.reshape(left, (WIDE // PIECE, PIECE)), 1)
            tl.store(pieces + row * piece_count + start // PIECE + tl.arange(0, WIDE // PIECE), summed)
        tl.debug_barrier()

        # 5. the draw
        piece = tl.arange(0, PIECES)
        parts = tl.load(pieces + row * piece_count + piece, mask=piece < piece_count, other=0)
        all_left = tl.sum(parts, 0)
        aim = (tl.load(u + row) * all_left.to(tl.float64)).to(tl.int64)
        aim = tl.minimum(aim, all_left - 1)
        at = tl.sum((tl.cumsum(parts, 0) <= aim).to(tl.int32), 0)
        aim -= tl.sum(tl.where(piece < at, parts, 0), 0)
        left = _left(weights, at * PIECE + tl.arange(0, PIECE), V, border, last_tie, least)
        chosen = at * PIECE + tl.sum((tl.cumsum(left, 0) <= aim).to(tl.int32), 0)
    tl.store(out + row, chosen)
    slot = tl.load(slots + row).to(tl.int64)
    if (slot >= 0) & (chosen >= 0):
        counter = counts + slot * V + chosen
        tl.store(counter, tl.maximum(tl.load(counter), 0) + 1)


@triton.jit
def _left(weights, token, V, border, last_tie, least):
    """What tokens weigh after the cuts, as whole numbers."""
    weight = tl.load(weights + token, mask=token < V, other=0.0)
    key = weight.to(tl.int32, bitcast=True)
    kept = (key > border) | ((key == border) & (token <= last_tie))
    return tl.where(kept & (weight >= least), _whole(weight), 0)
