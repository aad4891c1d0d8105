"""From a step's work to logits: lays out rows and pages, calls the native program or the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwenlet.cache import PagedPast, PagePool, Rows
from qwenlet.engine.scheduler import Work
from qwenlet.model import Qwen
from qwenlet.ops.attention import attention_backend
from qwenlet.program import QwenProgram


class Runner:
    """Args: step: most tokens of a step; the attribute says what the program allows of it."""

    def __init__(self, model: Qwen, pool: PagePool, device: torch.device, attention: str, step: int) -> None:
        self.model, self.pool, self.device, self.attention = model, pool, device, attention
        self.program = QwenProgram(model, pool, step) if pool.tiled else None
        self.step = step if self.program is None else min(step, self.program.capacity)

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> list[Tensor]:
        """Stores the tokens' keys and values; of each request float32 logits [wanted, V], on the model's device."""
        lengths = [len(one.tokens) for one in work]
        starts = [one.request.stored for one in work]
        spans = [torch.arange(start, start + count) for start, count in zip(starts, lengths, strict=True)]
        positions = torch.cat(spans).to(self.device)
        alphas, logn = tuple(one.request.alpha for one in work), tuple(one.request.logn for one in work)
        rows = Rows(positions, tuple(lengths), alphas, logn)
        ids = torch.tensor([token for one in work for token in one.tokens], device=self.device)
        wanted: list[int] = []
        end = 0
        for one, count in zip(work, lengths, strict=True):
            end += count
            wanted += range(end - one.wanted, end)
        logits = self._forward(ids, rows, [one.request.pages for one in work], starts, wanted)
        return list(logits.split([one.wanted for one in work]))

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int], alpha: float) -> Tensor:
        """Last hidden states, normed: float32 [len(ids), C] on the CPU, by the modules. No page is touched."""
        rows = Rows.fresh([len(ids)], [alpha], self.device)
        with attention_backend(self.attention):
            return self.model.hidden(torch.tensor(list(ids), device=self.device), rows).float().cpu()

    def _forward(
        self, ids: Tensor, rows: Rows, tables: Sequence[Sequence[int]], starts: Sequence[int], wanted: Sequence[int]
    ) -> Tensor:
        at = torch.tensor(wanted, dtype=torch.long, device=self.device)
        if self.program is not None:
            return self.program.forward(ids, rows, tables, starts, at)
        past = PagedPast(self.pool, rows, tables, starts)
        with attention_backend(self.attention):
            if not len(wanted):
                self.model.hidden(ids, rows, past)
                return torch.empty(0, self.model.config.vocab_size, device=self.device)
            return self.model(ids, rows, past, logits_at=at).float()
