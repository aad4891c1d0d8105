"""One prompt on its way through the engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwenlet.config import SamplingParams
from qwenlet.engine.records import Chunk, FinishReason, Timings
from qwenlet.engine.stop import StopTexts, StopTokens
from qwenlet.sampling import TokenCounts
from qwenlet.tokenizer import StreamDecoder


@dataclass(eq=False)
class Request:
    """State is a handful of counters: `stored` tokens of `prompt + reply` have their keys and values in pages.

    Attributes:
        params: resolved, with max_new_tokens and seed set.
        alpha: dynamic NTK factor, fixed when the request is made.
        decoder: None where the model has no tokenizer; the reply's text is then empty.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    alpha: float
    stop_tokens: StopTokens
    stop_texts: StopTexts
    decoder: StreamDecoder | None
    choice: int = 0
    dropped_turns: int = 0

    reply: list[int] = field(default_factory=list)
    stored: int = 0
    pages: list[int] = field(default_factory=list)
    counts: TokenCounts | None = None
    finish_reason: FinishReason | None = None
    failure: Exception | None = None
    outbox: deque[Chunk] = field(default_factory=deque)

    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    first_token_at: float | None = None
    latest_token_at: float | None = None

    @property
    def max_new_tokens(self) -> int:
        assert self.params.max_new_tokens is not None, "the engine sets max_new_tokens before it makes a request"
        return self.params.max_new_tokens

    @property
    def seed(self) -> int:
        assert self.params.seed is not None, "the engine draws a seed before it makes a request"
        return self.params.seed

    @property
    def total_tokens(self) -> int:
        """Most tokens the request can ever store."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def in_prefill(self) -> bool:
        return not self.reply

    def next_tokens(self, limit: int) -> Sequence[int]:
        """Tokens the next step runs: a piece of the prompt, or the newest token of the reply."""
        if self.in_prefill:
            return self.prompt[self.stored : self.stored + limit]
        return self.reply[-1:]

    @property
    def timings(self) -> Timings:
        if self.started_at is None:
            return Timings()
        first, latest = self.first_token_at, self.latest_token_at
        return Timings(
            queued_seconds=self.started_at - self.submitted_at,
            time_to_first_token=None if first is None else first - self.submitted_at,
            prefill_seconds=None if first is None else first - self.started_at,
            decode_seconds=None if first is None or latest is None else latest - first,
            prefill_tokens=len(self.prompt),
            decode_tokens=max(len(self.reply) - 1, 0),
        )
