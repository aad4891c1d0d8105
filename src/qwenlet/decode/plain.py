"""A step's operations by torch: the definition, and what runs without Triton.

Dimension letters: B rows, C hidden, H query heads, G key/value heads, D head size, P pages of a row, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenlet.cache import PAGE_TOKENS, PagePool
from qwenlet.decode.inputs import Inputs
from qwenlet.decode.slots import Slots
from qwenlet.model import Attention, Block, FeedForward, Qwen
from qwenlet.ops.pages import CachePages
from qwenlet.ops.reference import quantize_rows

Turn = tuple[Tensor, Tensor, Tensor]  # cos and sin [B, D/2], log-n factor [B], float32


class Plain:
    """Torch's operations, a few for each of a layer's steps."""

    def __init__(self, model: Qwen, pool: PagePool, slots: Slots) -> None:
        self.model, self.pool, self.slots = model, pool, slots

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B] int32 -> [B, C]."""
        return self.model.transformer.wte(ids)

    def qkv(self, block: Block, x: Tensor) -> Tensor:
        """x [B, C] -> [B, (H + 2G) D]."""
        return block.attn.c_attn(block.ln_1(x))

    def attend(self, attention: Attention, qkv: Tensor, turn: Turn, at: Inputs) -> Tensor:
        """Rotates, stores keys and values where they belong, answers the queries: [B, H D]."""
        heads, kv_heads = attention.heads, attention.kv_heads
        q, k, v = qkv.unflatten(-1, (-1, attention.head_dim)).split((heads, kv_heads, kv_heads), dim=1)
        q = _turned(q, turn) * turn[2].to(q.dtype)[:, None, None]
        pages = self.pool.layer(attention.layer)
        _store(_turned(k, turn), pages.k, pages.k_scales, at)
        _store(v, pages.v, pages.v_scales, at)
        return _attention(q, pages, at).flatten(1)

    def add(self, linear: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        """x + y W^T."""
        return x + linear(y)

    def gated(self, norm: nn.Module, mlp: FeedForward, x: Tensor) -> Tensor:
        """x [B, C] -> [B, inner]."""
        x = norm(x)
        return mlp.w1(x) * F.silu(mlp.w2(x))

    def logits(self, x: Tensor) -> Tensor:
        """x [B, C] -> [B, V] in x's dtype."""
        return self.model.lm_head(self.model.transformer.ln_f(x))

    def draw(self, logits: Tensor, at: Inputs) -> Tensor:
        """A token for each row, [B] int32, -1 where no logit is largest and finite; counts it where rows count."""
        counting = at.counted >= 0
        tables = self.slots.counts[at.counted.clamp_min(0)]
        tokens = draw(logits.float(), tables, at)
        rows, chosen = at.counted[counting].long(), tokens[counting].clamp_min(0).long()
        self.slots.counts[rows, chosen] = self.slots.counts[rows, chosen].clamp_min(0) + 1
        return tokens


def _turned(x: Tensor, turn: Turn) -> Tensor:
    cos, sin = turn[0][:, None], turn[1][:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _store(new: Tensor, pages: Tensor, scales: Tensor | None, at: Inputs) -> None:
    """new [B, G, D]; empty rows store nothing."""
    keep = at.positions >= 0
    place = at.positions[keep].long()
    page = at.tables[keep].gather(1, (place // PAGE_TOKENS)[:, None])[:, 0].long()
    slot = place % PAGE_TOKENS
    if scales is None:
        pages[page, :, slot] = new[keep].to(pages.dtype)
        return
    codes, each = quantize_rows(new[keep], new.shape[-1])
    pages[page, :, slot], scales[page, :, slot] = codes, each[..., 0]


def _attention(q: Tensor, pages: CachePages, at: Inputs) -> Tensor:
    """q [B, H, D] over each row's keys 0 to its position -> [B, H, D]."""
    longest = int(at.positions.max()) + 1
    tables = at.tables[:, : max(-(-longest // PAGE_TOKENS), 1)].long()
    k, v = (_read(*pair, tables, q.dtype) for pair in ((pages.k, pages.k_scales), (pages.v, pages.v_scales)))
    # an empty row sees one key, lest it see none; what comes of it is thrown away
    seen = torch.arange(k.shape[2], device=q.device) <= at.positions.clamp_min(0)[:, None]
    k, v = (torch.where(seen[:, None, :, None], x, 0.0) for x in (k, v))  # what was never written may be NaN
    return F.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
    )[:, :, 0]


def _read(pages: Tensor, scales: Tensor | None, tables: Tensor, dtype: torch.dtype) -> Tensor:
    """[pages, G, page, D] by tables [B, P] -> [B, G, P * page, D]."""
    found = pages[tables].transpose(1, 2).flatten(2, 3)
    if scales is None:
        return found.to(dtype)
    return (found.float() * scales[tables].transpose(1, 2).flatten(2, 3)[..., None]).to(dtype)


def draw(logits: Tensor, counts: Tensor, at: Inputs) -> Tensor:
    """`sampling.choose` for rows side by side: logits [B, V] float32, counts [B, V] as Slots has them -> [B] int32."""
    seen, replied = counts >= 0, counts.clamp_min(0)
    repetition = at.repetition[:, None]
    values = torch.where(logits > 0, logits / repetition, logits * repetition)
    values = values - (at.presence[:, None] * (replied > 0) + at.frequency[:, None] * replied)
    logits = torch.where(seen & (at.counted >= 0)[:, None], values, logits)
    peak = logits.max(-1).values
    greedy = logits.argmax(-1)
    shifted = (logits - peak[:, None]) / torch.where(at.temperature > 0, at.temperature, 1.0)[:, None]
    # in the order of their likeliness, so that each cut keeps a beginning
    ordered, ids = shifted.sort(dim=-1, descending=True, stable=True)
    size = ordered.shape[1]
    k = torch.where((at.top_k > 0) & (at.top_k < size), at.top_k, size).long()
    kept = ordered >= ordered.gather(1, k[:, None] - 1)
    inside = ordered.masked_fill(~kept, -math.inf)
    mass = inside.softmax(-1, dtype=torch.float64).cumsum(-1)
    top_p = at.top_p.double()[:, None]
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), dim=-1)
    kept &= (before < top_p) | (top_p >= 1.0)
    kept &= ordered >= at.min_p.clamp_min(0.0).log()[:, None]
    # drawn in the order of ids, as everywhere
    weights = ordered.double().exp().masked_fill(~kept, 0.0)
    plain = torch.zeros_like(weights).scatter(1, ids, weights).cumsum(-1)
    drawn = torch.searchsorted(plain, plain[:, -1:] * at.u[:, None], right=True)[:, 0].clamp_max(size - 1)
    tokens = torch.where(at.temperature > 0, drawn, greedy)
    return torch.where(peak.isfinite(), tokens, -1).to(torch.int32)
