"""What the engine counts, ready for a metrics page."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

from qwenlet.engine.records import FinishReason, Timings


@dataclass
class Histogram:
    """Observations by size, as Prometheus counts them.

    Attributes:
        bounds: upper ends of the buckets; one more bucket has no end.
        counts: observations in each bucket.
        total: their sum.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)


_FIRST_TOKEN = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
_BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


@dataclass
class Stats:
    """Counters since the engine was made; the engine's own `stats` fills in what is true at the moment.

    Attributes:
        running, waiting: requests now.
        pages, pages_used, pages_cached: in all, held by requests, held by the prefix cache alone.
        steps: calls of the model. failed_steps: those that raised.
        prompt_tokens: of requests that ended or run, as they were admitted; asked_tokens,
            cached_tokens: looked up in the prefix cache, and found there.
        generated_tokens: of all replies.
        preemptions: times a request gave its pages back and began anew.
        guessed, accepted: tokens proposed by prompt lookup, and those that were right.
        finished: requests by finish reason.
        seconds: spent in "schedule", "run" (the model) and "sample" (from logits to tokens, text and chunks).
        first_token, between_tokens: seconds from submission, and from token to token.
        whole: seconds from submission to the end; queued, prefill, decode: their parts, of requests that came so far.
    """

    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    steps: int = 0
    failed_steps: int = 0
    prompt_tokens: int = 0
    asked_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    guessed: int = 0
    accepted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"schedule": 0.0, "run": 0.0, "sample": 0.0})
    first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(_BETWEEN))
    whole: Histogram = field(default_factory=lambda: Histogram(_WHOLE))
    queued: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN))
    prefill: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN))
    decode: Histogram = field(default_factory=lambda: Histogram(_WHOLE))

    def ended(self, reason: FinishReason, seconds: float, timings: Timings) -> None:
        """Counts a request that has ended, so many seconds after it was submitted."""
        self.finished[reason] += 1
        self.whole.observe(seconds)
        parts = (timings.queued_seconds, timings.prefill_seconds, timings.decode_seconds)
        for histogram, took in zip((self.queued, self.prefill, self.decode), parts, strict=True):
            if took is not None:
                histogram.observe(took)
