"""From logits to tokens on the device, without waiting for them: what qwenlet.sampling defines, for all rows at once.

Dimension letters: B rows, V vocabulary, S tables of counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What each row asks for, as tensors on the device that a step reads in place.

    Attributes:
        temperature: [B] float32, 0 for greedy; top_p, min_p: [B] float32; top_k: [B] int32, 0 for all.
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
        zeros, ones = torch.zeros(rows, device=device), torch.ones(rows, device=device)
        return cls(
            zeros.clone(),
            ones.clone(),
            zeros.clone(),
            zeros.to(torch.int32),
            ones.clone(),
            zeros.clone(),
            zeros.clone(),
            zeros.double(),
            torch.full((rows,), -1, dtype=torch.int32, device=device),
            torch.full((tables, vocabulary), -1, dtype=torch.int32, device=device),
        )


class SampleScratch:
    """Memory that `sample` works in: 8 bytes a row and word of the vocabulary, and histograms."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device | str) -> None:
        self.rows, self.vocabulary = rows, vocabulary
        self.logits = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)


def sample(logits: Tensor, settings: Settings, scratch: SampleScratch, *, out: Tensor | None = None) -> Tensor:
    """A token of each row, counted in its table.

    Penalties, temperature, top-k, top-p, min-p and the draw are `sampling.choose`'s; sums are of whole numbers (weights
    in units of 2^-40), so that no order of additions can change a token.

    Args:
        logits: [B, V] of any float dtype.
        out: [B] int32, written to.
    Returns:
        [B] int32; -1 where the largest logit is not finite.
    """
    from qwenlet.ops.triton import _reference_sampling

    tokens = _reference_sampling.sample(logits, settings)
    return tokens if out is None else out.copy_(tokens)
