"""From a step's work to logits: lays out rows and pages, calls the native program or the model. On a GPU single tokens
of replies go to the decode program, which draws the next ones too."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qwenlet.cache import PagedPast, PagePool, Rows
from qwenlet.engine.decoding import Decoding
from qwenlet.engine.request import Request
from qwenlet.engine.scheduler import Work
from qwenlet.lora.rows import Group, LoadedAdapter, RowAdapters
from qwenlet.model import Qwen
from qwenlet.ops.attention import attention_backend
from qwenlet.program import QwenProgram


class Runner:
    """Args: step: most tokens of a step; the attribute says what the program allows of it.

    Attributes:
        wanted: adapters that rows may go with; the next step has them.
        drawn: tokens that the latest step drew itself.
    """

    def __init__(
        self,
        model: Qwen,
        pool: PagePool,
        device: torch.device,
        attention: str,
        step: int,
        decoding: Decoding | None = None,
    ) -> None:
        self.model, self.pool, self.device, self.attention = model, pool, device, attention
        self.program = QwenProgram(model, pool, step) if pool.tiled else None
        self.step = step if self.program is None else min(step, self.program.capacity)
        self.decoding = decoding
        self.drawn: dict[Request, int] = {}
        self.wanted: tuple[LoadedAdapter, ...] = ()
        self._recorded: tuple[LoadedAdapter, ...] = ()
        self._rows = RowAdapters(model)

    def _take_adapters(self, groups: Sequence[Group]) -> None:
        """Records the program anew where one of these adapters is new to it. Those taken away go then, too."""
        # one that was taken away may still have requests that run
        needed = dict.fromkeys([*self.wanted, *(group.adapter for group in groups)])
        if needed.keys() <= set(self._recorded):
            return
        adapters = tuple(needed)
        for adapter in adapters:
            self._rows.hook(adapter)
        self._recorded = adapters
        if self.program is not None:
            self.program = QwenProgram(self.model, self.pool, self.step, [adapter.sides() for adapter in adapters])

    def close(self) -> None:
        self._rows.close()

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> list[Tensor]:
        """Stores the tokens' keys and values; of each request float32 logits [wanted, V], on the model's device.

        Of one that reads hidden states, those of its tokens [n, C]; of one whose token is drawn, logits as they come.
        """
        self.drawn = {}
        with _on(self.device):
            return self._run(work) if self.decoding is None else self._decoded(work, self.decoding)

    def _decoded(self, work: Sequence[Work], decoding: Decoding) -> list[Tensor]:
        """Single tokens by the decode program, the rest as always."""
        single = [one for one in work if decoding.takes(one)]
        others = [one for one in work if not decoding.takes(one)]
        decoding.start(single, alone=not others)
        found = dict(zip((one.request for one in others), self._run(others) if others else (), strict=True))
        for one, (logits, token) in zip(single, decoding.finish(), strict=True):
            found[one.request] = logits
            if token is not None:
                self.drawn[one.request] = token
        return [found[one.request] for one in work]

    def recover(self) -> None:
        """After a step that failed: what was on its way is forgotten."""
        if self.decoding is not None:
            self.decoding.reset()

    def _run(self, work: Sequence[Work]) -> list[Tensor]:
        # rows of one adapter together, those without one first
        order = sorted(range(len(work)), key=lambda i: _number(work[i].request.adapter))
        ordered = [work[i] for i in order]
        lengths = [len(one.tokens) for one in ordered]
        starts = [one.request.stored for one in ordered]
        spans = zip(starts, lengths, strict=True)
        positions = [at for start, count in spans for at in range(start, start + count)]
        alphas, logn = tuple(one.request.alpha for one in ordered), tuple(one.request.logn for one in ordered)
        ids = [token for one in ordered for token in one.tokens]
        wanted: list[int] = []
        end = 0
        for one, count in zip(ordered, lengths, strict=True):
            end += count
            wanted += range(end - one.wanted, end)
        adapters = [one.request.adapter for one in ordered]
        tokens, outputs = _groups(adapters, lengths), _groups(adapters, [one.wanted for one in ordered])
        self._take_adapters(tokens)
        # of one array: for a decoded token to make a tensor of a list takes as long as all the rest here
        numbers = torch.frombuffer(array("q", [*ids, *positions, *wanted]), dtype=torch.long).to(self.device)
        count = len(ids)
        rows = Rows(numbers[count : 2 * count], tuple(lengths), alphas, logn)
        with self._rows.rows(tokens, outputs):
            tables = [one.request.pages for one in ordered]
            logits, hidden = self._forward(numbers[:count], rows, tables, starts, numbers[2 * count :], tokens)
        ends = list(itertools.accumulate(one.wanted for one in ordered))
        found = [logits[end - one.wanted : end] for one, end in zip(ordered, ends, strict=True)]
        if any(one.request.reads_hidden for one in ordered):
            states = hidden().split(lengths)
            found = [states[at] if one.request.reads_hidden else found[at] for at, one in enumerate(ordered)]
        each = dict(zip(order, found, strict=True))
        return [each[at] for at in range(len(work))]

    def _forward(
        self, ids: Tensor, rows: Rows, tables: Sequence[Sequence[int]], starts: Sequence[int], wanted: Tensor,
        groups: Sequence[Group],
    ) -> tuple[Tensor, Callable[[], Tensor]]:  # fmt: skip
        """Logits, and what gives the hidden states of all tokens."""
        if (program := self.program) is not None:
            adapted = [(self._recorded.index(group.adapter), group.last - group.first) for group in groups]
            return program.forward(ids, rows, tables, starts, wanted, adapted=adapted), lambda: program.hidden(len(ids))
        past = PagedPast(self.pool, rows, tables, starts)
        with attention_backend(self.attention):
            hidden = self.model.hidden(ids, rows, past)
            if not len(wanted):
                logits = torch.empty(0, self.model.config.vocab_size, device=self.device)
            else:
                logits = self.model.lm_head(hidden[wanted]).float()
        return logits, lambda: hidden


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the thread's own GPU, whichever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
