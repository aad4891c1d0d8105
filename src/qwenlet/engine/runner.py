"""Lays out ids, positions and pages for one step, and runs the model: as a native program where it can be one, else by
its modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwenlet.cache import PagedPast, PagePool, Rows, pages_for
from qwenlet.engine.request import Request
from qwenlet.model import Qwen
from qwenlet.ops.attention import attention_backend
from qwenlet.program import QwenProgram

# Tokens of a call where logits of many positions are wanted.
_PIECE = 512


class Runner:
    """Args: chunk: most tokens of a request's step; the attribute says what the program allows of it."""

    def __init__(self, model: Qwen, pool: PagePool, device: torch.device, attention: str, chunk: int) -> None:
        self.model, self.pool, self.device, self.attention = model, pool, device, attention
        self.program = QwenProgram(model, pool, max(chunk, _PIECE)) if pool.tiled else None
        self.chunk = chunk if self.program is None else min(chunk, self.program.capacity)

    @torch.inference_mode()
    def run(self, request: Request, tokens: Sequence[int]) -> Tensor | None:
        """Stores the tokens' keys and values; [V] float32 logits of the last one, or None while the prompt goes on."""
        last_piece = request.stored + len(tokens) >= len(request.prompt)
        wanted = [len(tokens) - 1] if last_piece else []
        logits = self._forward(tokens, request.stored, request.alpha, request.pages, wanted)
        return logits[0] if last_piece else None

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], alpha: float, first: int) -> Tensor:
        """Float32 logits [len(ids) - first, V] on the CPU from position `first` on, of ids without a past."""
        if self.program is None:
            rows = Rows.fresh([len(ids)], [alpha], self.device)
            wanted = torch.arange(first, len(ids), device=self.device) if first else None
            with attention_backend(self.attention):
                return self.model(torch.tensor(ids, device=self.device), rows, logits_at=wanted).float().cpu()
        # as a request would: in pieces, through pages
        parts, pages = [], self.pool.take(pages_for(len(ids)))
        try:
            for start in range(0, len(ids), self.program.capacity):
                piece = ids[start : start + self.program.capacity]
                parts.append(self._forward(piece, start, alpha, pages, range(max(first - start, 0), len(piece))))
        finally:
            self.pool.give_back(pages)
        return torch.cat(parts)

    def _forward(
        self, tokens: Sequence[int], start: int, alpha: float, pages: Sequence[int], wanted: Sequence[int]
    ) -> Tensor:
        """Float32 logits [len(wanted), V] of the tokens at indices `wanted`, on the model's device."""
        rows = Rows.single(start, len(tokens), alpha, self.device)
        ids = torch.tensor(tokens, device=self.device)
        at = torch.tensor(wanted, dtype=torch.long, device=self.device)
        if self.program is not None:
            return self.program.forward(ids, rows, [pages], [start], at)
        past = PagedPast(self.pool, rows, [pages], [start])
        with attention_backend(self.attention):
            if not len(wanted):
                self.model.hidden(ids, rows, past)
                return torch.empty(0, self.model.config.vocab_size, device=self.device)
            return self.model(ids, rows, past, logits_at=at).float()
