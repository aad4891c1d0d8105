"""Lays out ids, positions and pages for one step, and calls the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwenlet.cache import PagedPast, PagePool, Rows
from qwenlet.engine.request import Request
from qwenlet.model import Qwen
from qwenlet.ops.attention import attention_backend


class Runner:
    def __init__(self, model: Qwen, pool: PagePool, device: torch.device, attention: str) -> None:
        self.model, self.pool, self.device, self.attention = model, pool, device, attention

    @torch.inference_mode()
    def run(self, request: Request, tokens: Sequence[int]) -> Tensor | None:
        """Stores the tokens' keys and values; [V] float32 logits of the last one, or None while the prompt goes on."""
        rows = Rows.single(request.stored, len(tokens), request.alpha, self.device)
        past = PagedPast(self.pool, rows, [request.pages], [request.stored])
        ids = torch.tensor(tokens, device=self.device)
        last_piece = request.stored + len(tokens) >= len(request.prompt)
        with attention_backend(self.attention):
            if not last_piece:
                self.model.hidden(ids, rows, past)
                return None
            last = torch.tensor([len(tokens) - 1], device=self.device)
            return self.model(ids, rows, past, logits_at=last)[0].float()
