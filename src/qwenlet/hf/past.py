"""transformers' cache as the model sees a past, and the NTK factor of each row beside it.

Dimension letters: B rows, T new tokens, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenlet.config import ModelConfig


class QWenCache(DynamicCache):
    """A cache whose rows keep their NTK factors through reordering, repeating and selecting.

    Attributes:
        alphas: one factor per row, set by the whole prompt; empty before it was seen.
    """

    alphas: tuple[float, ...] = ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.alphas = tuple(alpha for alpha in self.alphas for _ in range(repeats))

    def reset(self) -> None:
        super().reset()
        self.alphas = ()

    def _select(self, indices: Tensor) -> None:
        if self.alphas:
            self.alphas = tuple(self.alphas[i] for i in indices.tolist())


def alphas_of(cache: Cache | None) -> tuple[float, ...]:
    """The factors a cache carries; a cache of another kind has them as a mere attribute."""
    return getattr(cache, "alphas", ())


class _Heads(nn.Module):
    """What transformers' attention functions ask of a module."""

    is_causal = True

    def __init__(self, groups: int, head_dim: int, layer: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.head_dim, self.layer_idx = groups, head_dim, layer


@lru_cache(maxsize=256)
def _heads(groups: int, head_dim: int, layer: int) -> _Heads:
    """Kept: made anew, each costs 7 µs a layer and call."""
    return _Heads(groups, head_dim, layer)


class CachePast:
    """One forward call over a batch of rows of one length, padded where the mask says so.

    Args:
        cache: keeps keys and values; None: nothing is kept.
        mask: as transformers' masking makes it for `implementation`.
    """

    def __init__(
        self,
        config: ModelConfig,
        implementation: str,
        cache: Cache | None,
        mask: Tensor | None,
        shape: tuple[int, int],
        extra: dict[str, Any],
    ) -> None:
        self.config, self.cache, self.mask, self.shape, self.extra = config, cache, mask, shape, extra
        self.function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        self.weights: list[Tensor | None] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, self.shape).transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        heads = _heads(groups, self.config.head_dim, layer)
        out, weights = self.function(
            heads, q, k, v, self.mask, dropout=0.0, scaling=self.config.head_dim**-0.5, **self.extra
        )
        self.weights.append(weights)
        return out.flatten(0, 1)


def eager_attention(
    module: _Heads, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention in plain operators, which shows its weights: q [B, H, T, D], k and v [B, G, S, D] -> [B, T, H, D]."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights
