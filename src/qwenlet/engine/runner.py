"""From a step's work to logits: lays out rows and pages, calls the native program or the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwenlet.cache import PagedPast, PagePool, Rows
from qwenlet.engine.scheduler import Work
from qwenlet.lora.rows import Group, LoadedAdapter, RowAdapters
from qwenlet.model import Qwen
from qwenlet.ops.attention import attention_backend
from qwenlet.program import QwenProgram


class Runner:
    """Args: step: most tokens of a step; the attribute says what the program allows of it.

    Attributes: adapters: that rows may go with.
    """

    def __init__(self, model: Qwen, pool: PagePool, device: torch.device, attention: str, step: int) -> None:
        self.model, self.pool, self.device, self.attention = model, pool, device, attention
        self.program = QwenProgram(model, pool, step) if pool.tiled else None
        self.step = step if self.program is None else min(step, self.program.capacity)
        self.adapters: list[LoadedAdapter] = []
        self._rows = RowAdapters(model)

    def set_adapters(self, adapters: Sequence[LoadedAdapter]) -> None:
        """Records the program anew, with these. Between two steps only."""
        for adapter in adapters:
            self._rows.hook(adapter)
        self.adapters = list(adapters)
        if self.program is not None:
            self.program = QwenProgram(self.model, self.pool, self.step, [adapter.sides() for adapter in adapters])

    def close(self) -> None:
        self._rows.close()

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> list[Tensor]:
        """Stores the tokens' keys and values; of each request float32 logits [wanted, V], on the model's device."""
        # rows of one adapter together, those without one first
        order = sorted(range(len(work)), key=lambda i: _number(work[i].request.adapter))
        ordered = [work[i] for i in order]
        lengths = [len(one.tokens) for one in ordered]
        starts = [one.request.stored for one in ordered]
        spans = [torch.arange(start, start + count) for start, count in zip(starts, lengths, strict=True)]
        rows = Rows(torch.cat(spans).to(self.device), tuple(lengths), tuple(one.request.alpha for one in ordered))
        ids = torch.tensor([token for one in ordered for token in one.tokens], device=self.device)
        wanted: list[int] = []
        end = 0
        for one, count in zip(ordered, lengths, strict=True):
            end += count
            wanted += range(end - one.wanted, end)
        adapters = [one.request.adapter for one in ordered]
        tokens, outputs = _groups(adapters, lengths), _groups(adapters, [one.wanted for one in ordered])
        with self._rows.rows(tokens, outputs):
            logits = self._forward(ids, rows, [one.request.pages for one in ordered], starts, wanted, tokens)
        each: list[Tensor] = [logits] * len(work)
        for i, part in zip(order, logits.split([one.wanted for one in ordered]), strict=True):
            each[i] = part
        return each

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int], alpha: float, adapter: LoadedAdapter | None = None) -> Tensor:
        """Last hidden states, normed: float32 [len(ids), C] on the CPU, by the modules. No page is touched."""
        rows = Rows.fresh([len(ids)], [alpha], self.device)
        groups = _groups([adapter], [len(ids)])
        with attention_backend(self.attention), self._rows.rows(groups, ()):
            return self.model.hidden(torch.tensor(list(ids), device=self.device), rows).float().cpu()

    def _forward(
        self, ids: Tensor, rows: Rows, tables: Sequence[Sequence[int]], starts: Sequence[int], wanted: Sequence[int],
        groups: Sequence[Group],
    ) -> Tensor:  # fmt: skip
        at = torch.tensor(wanted, dtype=torch.long, device=self.device)
        if self.program is not None:
            # one that was taken out while its request came in
            if late := [group.adapter for group in groups if group.adapter not in self.adapters]:
                self.set_adapters([*self.adapters, *late])
            adapted = [(self.adapters.index(group.adapter), group.last - group.first) for group in groups]
            return self.program.forward(ids, rows, tables, starts, at, adapted=adapted)
        past = PagedPast(self.pool, rows, tables, starts)
        with attention_backend(self.attention):
            if not len(wanted):
                self.model.hidden(ids, rows, past)
                return torch.empty(0, self.model.config.vocab_size, device=self.device)
            return self.model(ids, rows, past, logits_at=at).float()


def _number(adapter: LoadedAdapter | None) -> int:
    return 0 if adapter is None else adapter.number


def _groups(adapters: Sequence[LoadedAdapter | None], lengths: Sequence[int]) -> list[Group]:
    """Neighbours of one adapter as one group."""
    groups: list[Group] = []
    end = 0
    for adapter, length in zip(adapters, lengths, strict=True):
        first, end = end, end + length
        if adapter is None:
            continue
        if groups and groups[-1].adapter is adapter:
            groups[-1] = Group(adapter, groups[-1].first, end)
        else:
            groups.append(Group(adapter, first, end))
    return groups
