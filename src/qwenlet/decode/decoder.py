"""Launches steps, and tells their tokens when they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qwenlet.cache import PAGE_TOKENS, PagePool
from qwenlet.config import SamplingParams
from qwenlet.decode.graphs import Eager, Replay, graphs_for
from qwenlet.decode.inputs import BUCKETS, EMPTY, Inputs, bucket_of
from qwenlet.decode.plain import Plain
from qwenlet.decode.program import Steps, step
from qwenlet.decode.slots import Slots
from qwenlet.model import Qwen
from qwenlet.sampling import is_greedy

_LARGEST_K = (1 << 31) - 1  # more than any vocabulary: cuts nothing
_STEPS_IN_FLIGHT = 3  # whose inputs and tokens may be on their way at once: this one, the next, one that was given up


@dataclass(frozen=True)
class Row:
    """One reply's part in a step.

    Attributes:
        reply: the same object as long as slot, params and counted are the same and its pages only grow.
        token: to be stored; None: what row `source` of the launch before draws.
        position: the token's place.
        u: the draw in [0, 1), unless greedy.
        counted: penalties act.
    """

    reply: object
    slot: int
    token: int | None
    source: int
    position: int
    pages: Sequence[int]
    params: SamplingParams
    u: float
    counted: bool


class Launch:
    """A step on its way.

    Attributes: logits: [rows, V] in the model's dtype; the next launch overwrites them.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, event: torch.cuda.Event | None) -> None:
        self.logits, self._tokens, self._event = logits, tokens, event

    def tokens(self) -> list[int]:
        """Waits for them. -1 for a row without a finite largest logit."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


class Decoder:
    """Attributes:
        launch_rows: most rows of one launch.

    Args:
        rows: most replies at a time.
        pages: of the longest request.
        kernels: our own, recorded where there is a GPU; else torch's operations, which wait for the device.
    """

    def __init__(
        self,
        model: Qwen,
        pool: PagePool,
        rows: int,
        pages: int,
        device: torch.device,
        *,
        kernels: bool,
    ) -> None:
        self.model, self.device, self.rows = model, device, rows
        self.slots = Slots(model.config, rows, device)
        self._pages = pages
        self._steps: Steps = _kernels(model, pool, self.slots) if kernels else Plain(model, pool, self.slots)
        self._graphs = graphs_for(device) if kernels else Eager()
        self._buckets: dict[int, _Bucket] = {}
        self.launch_rows = min(rows, BUCKETS[-1])
        self._in_flight = _STEPS_IN_FLIGHT * -(-rows // self.launch_rows)
        self._tokens = torch.zeros(bucket_of(self.launch_rows), dtype=torch.int32, device=device)
        self._turn = 0

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row]) -> Launch:
        """Runs a step of these rows, at most `launch_rows`; no more than three steps may be on their way at a time."""
        size = bucket_of(len(rows))
        if size not in self._buckets:
            self._buckets[size] = _Bucket(self, size)
        bucket = self._buckets[size]
        self._turn = (self._turn + 1) % self._in_flight
        host = bucket.host[self._turn]
        host.fill(rows)
        bucket.inputs.buffer.copy_(host.inputs.buffer, non_blocking=True)
        bucket.replay()
        landed = bucket.landed[self._turn]
        landed.copy_(self._tokens[:size], non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        assert bucket.logits is not None
        return Launch(bucket.logits[: len(rows)], landed[: len(rows)], event)


def _kernels(model: Qwen, pool: PagePool, slots: Slots) -> Steps:
    from qwenlet.decode.fused import Fused  # imports triton

    return Fused(model, pool, slots)


class _Bucket:
    """The buffers of one number of rows, and the step over them."""

    def __init__(self, decoder: Decoder, size: int) -> None:
        pinned = decoder.device.type == "cuda"
        self.inputs = Inputs.allocate(size, decoder._pages, decoder.device)
        self.host = [_Host(size, decoder._pages, pinned) for _ in range(decoder._in_flight)]
        self.landed = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(decoder._in_flight)]
        self.logits: Tensor | None = None

        def run() -> None:
            self.logits = step(decoder.model, decoder._steps, decoder.slots, self.inputs, decoder._tokens)

        # all rows are empty while it is recorded: it stores and counts nothing
        self.replay: Replay = decoder._graphs.record(run)


class _Host:
    """The host's side of a bucket's inputs. What a row had when it was filled last is known, as most of it stays."""

    def __init__(self, rows: int, pages: int, pinned: bool) -> None:
        self.inputs = Inputs.allocate(rows, pages, torch.device("cpu"), pinned=pinned)
        self._views = {
            field.name: getattr(self.inputs, field.name).numpy() for field in fields(Inputs) if field.name != "buffer"
        }
        self._filled: list[tuple[object, int]] = [(None, 0)] * rows

    def fill(self, rows: Sequence[Row]) -> None:
        """The rows, and empty ones behind them."""
        views = self._views
        views["positions"][len(rows) :] = EMPTY
        views["source"][len(rows) :] = -1
        views["slots"][len(rows) :] = 0
        views["counted"][len(rows) :] = -1
        for at, row in enumerate(rows):
            params = row.params
            views["ids"][at] = row.token or 0
            views["source"][at] = row.source if row.token is None else -1
            views["positions"][at] = row.position
            views["slots"][at] = row.slot
            views["u"][at] = row.u
            views["counted"][at] = row.slot if row.counted else -1
            reply, table = self._filled[at]
            if reply is not row.reply:
                reply, table = row.reply, 0
                views["top_k"][at] = min(params.top_k or 0, _LARGEST_K)
                views["temperature"][at] = 0.0 if is_greedy(params) else params.temperature
                views["top_p"][at] = 1.0 if params.top_p is None else params.top_p
                views["min_p"][at] = params.min_p or 0.0
                views["repetition"][at] = params.repetition_penalty or 1.0
                views["presence"][at] = params.presence_penalty
                views["frequency"][at] = params.frequency_penalty
            # a page that is written may have been copied since; those before it stay as they are
            table = min(table, max(row.position // PAGE_TOKENS - 1, 0))
            views["tables"][at, table : len(row.pages)] = row.pages[table:]
            self._filled[at] = (reply, len(row.pages))
