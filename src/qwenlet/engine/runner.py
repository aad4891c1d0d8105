"""From a step's work to logits: lays out rows and pages, calls the native program or the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        """Stores the tokens' keys and values; of each request float32 logits [wanted, V], on the model's device.

        Of one that reads hidden states, those of its tokens [n, C].
        """
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
        logits, hidden = self._forward(ids, rows, [one.request.pages for one in work], starts, wanted)
        found = list(logits.split([one.wanted for one in work]))
        if not any(one.request.reads_hidden for one in work):
            return found
        states = hidden().split(lengths)
        return [states[at] if one.request.reads_hidden else found[at] for at, one in enumerate(work)]

    def _forward(
        self, ids: Tensor, rows: Rows, tables: Sequence[Sequence[int]], starts: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Logits, and what gives the hidden states of all tokens."""
        at = torch.tensor(wanted, dtype=torch.long, device=self.device)
        if (program := self.program) is not None:
            return program.forward(ids, rows, tables, starts, at), lambda: program.hidden(len(ids))
        past = PagedPast(self.pool, rows, tables, starts)
        with attention_backend(self.attention):
            hidden = self.model.hidden(ids, rows, past)
            if not len(wanted):
                logits = torch.empty(0, self.model.config.vocab_size, device=self.device)
            else:
                logits = self.model.lm_head(hidden[at]).float()
        return logits, lambda: hidden
