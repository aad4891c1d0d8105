"""What stays on the device as long as a reply is written."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenlet.config import ModelConfig
from qwenlet.model import inverse_frequencies, logn_table
from qwenlet.sampling import TokenCounts

UNSEEN = -1  # a token's count where the request has not seen it; 0: in its prompt; n: n times in its reply


class Slots:
    """Args: count: replies at a time.

    Attributes:
        frequencies: [S, D/2] float32, of the rotary embedding with the row's NTK factor.
        logn: [S] float32, 1 where log-n attention acts.
        counts: [S, V] int32: -1 for a token that was never seen, 0 for one of the prompt, n for n times in the reply.
        logn_table: [positions] float32, or None where the model has no log-n attention.
    """

    def __init__(self, config: ModelConfig, count: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.frequencies = torch.zeros(count, config.head_dim // 2, device=device)
        self.logn = torch.zeros(count, device=device)
        self.counts = torch.full((count, config.vocab_size), UNSEEN, dtype=torch.int32, device=device)
        self.logn_table: Tensor | None = logn_table(config.seq_length, device) if config.use_logn_attn else None
        self._free = list(range(count - 1, -1, -1))

    def take(self) -> int | None:
        """A slot that nobody holds; None: all are held."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} was given back twice"
        self._free.append(slot)

    def begin(self, slot: int, alpha: float, logn: bool) -> None:
        """For a row with this NTK factor."""
        config = self.config
        self.frequencies[slot] = inverse_frequencies(config.rope_theta, config.head_dim, alpha, self.device)
        self.logn[slot] = float(logn)

    def count(self, slot: int, counts: TokenCounts | None) -> None:
        """Sets what the row has seen; None: nothing counts."""
        self.counts[slot].fill_(UNSEEN)
        if counts is not None:
            self.counts[slot][counts.ids.to(self.device)] = counts.replied.to(self.device, torch.int32)

    def rotation(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin [B, D/2] and the log-n factor [B], float32, of rows at positions [B]; empty ones as at 0."""
        at = positions.clamp_min(0)
        frequencies = self.frequencies.index_select(0, slots)
        angle = at.float()[:, None] * frequencies
        if self.logn_table is None:
            factor = torch.ones_like(angle[:, 0])
        else:
            acts = self.logn.index_select(0, slots) > 0.0
            factor = self.logn_table.index_select(0, at.clamp_max(len(self.logn_table) - 1)).masked_fill(~acts, 1.0)
        return angle.cos(), angle.sin(), factor
