"""How widely attention is spread: the entropy of each head's weights, position by position.

A query that looks at n keys alike has an entropy of ln n nats, one that looks at a single key has 0. With more keys to
look at than in training it grows, and what is looked for is diluted; log-n attention is published as what keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwenlet.cache import NoPast, Rows
from qwenlet.model import Qwen

_BLOCK = 256  # queries whose weights stand in memory at once


class WatchedPast(NoPast):
    """One row without a past, which notes the entropy of its attention.

    Attributes:
        entropies: per layer [H, T] float32, in nats.
    """

    def __init__(self, rows: Rows) -> None:
        assert len(rows.lengths) == 1, f"one row is watched, not {len(rows.lengths)}"
        super().__init__(rows)
        self.entropies: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.entropies.append(entropy(q, k))
        return super().attend(layer, q, k, v)


def entropy(q: Tensor, k: Tensor) -> Tensor:
    """Entropy [H, T] float32, in nats, of the causal attention of queries [T, H, D] to keys [T, G, D], rotated."""
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    places = torch.arange(len(k), device=k.device)
    parts = []
    for begin in range(0, len(q), _BLOCK):
        queries = q[begin : begin + _BLOCK].float()
        end = begin + len(queries)
        scores = torch.einsum("thd,shd->hts", queries, keys[:end]) / math.sqrt(q.shape[-1])
        hidden = places[:end] > places[begin:end, None]
        logs = scores.masked_fill(hidden, -math.inf).log_softmax(-1)
        # 0 of a key that isn't seen: 0 times its infinite logarithm would be no number
        parts.append(-(logs.exp() * logs.masked_fill(hidden, 0.0)).sum(-1))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def attention_entropy(model: Qwen, ids: Sequence[int], *, ntk: bool = True, logn: bool = True) -> Tensor:
    """Entropy [layers, H, T] float32, in nats, of a model's attention while it reads T ids.

    Args:
        model: in evaluation mode, its linears run by anything.
        ntk, logn: False takes dynamic NTK, or log-n attention, away from a model that has it.
    """
    device = model.transformer.wte.weight.device
    alpha = model.config.ntk_alpha(len(ids)) if ntk else 1.0
    rows = Rows(torch.arange(len(ids), device=device), (len(ids),), (alpha,), (logn,))
    past = WatchedPast(rows)
    model.hidden(torch.tensor(ids, device=device), rows, past)
    return torch.stack(past.entropies)
