"""One prompt on its way through the engine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

from torch import Tensor

from qwenlet.config import SamplingParams
from qwenlet.engine.bell import Listener
from qwenlet.engine.records import Chunk, FinishReason, Timings
from qwenlet.engine.speculation import Lookup
from qwenlet.engine.stop import StopTexts, StopTokens
from qwenlet.sampling import Bias, TokenCounts
from qwenlet.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from qwenlet.grammar import Matcher
    from qwenlet.lora.rows import LoadedAdapter

# takes float32 logits [n, V], or hidden states [n, C], of the positions from the first number on
Reader = Callable[[int, Tensor], None]

_arrivals = itertools.count()


@dataclass(eq=False)
class Request:
    """State is a handful of counters: `stored` of the tokens `known` have their keys and values in `pages`.

    Attributes:
        known: the prompt, and behind it the reply so far.
        params: resolved, with max_new_tokens and seed set.
        alpha: dynamic NTK factor, fixed when the request is made.
        logn: whether log-n attention acts, where the model has it.
        decoder: None where the model has no tokenizer; the reply's text is then empty.
        priority: lower goes first; equal ones in the order they came.
        timeout: seconds from submission within which the request has to end; None: any time.
        followers: other choices of the same prompt, which take over its pages when it is stored.
        adapter: that the request goes with; None: the model alone.
        reader, read_from: gets the logits of positions from `read_from` on; such a request has no reply.
        reads_hidden: the reader gets hidden states instead.
        bias: of the params; `early_bias` holds before the reply has its least tokens, and keeps it from ending.
        cached: tokens of the prompt whose keys and values were found.
        indexed: full pages that the prefix cache knows.
        ending: how it is to end when the step that runs does.
        drafted: guesses among the tokens of the step that runs.
        listener: told when chunks were put into the outbox.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    alpha: float
    stop_tokens: StopTokens
    stop_texts: StopTexts
    decoder: StreamDecoder | None = None
    choice: int = 0
    dropped_turns: int = 0
    priority: int = 0
    timeout: float | None = None
    logn: bool = True
    adapter: LoadedAdapter | None = None
    reader: Reader | None = None
    read_from: int = 0
    reads_hidden: bool = False
    counts: TokenCounts | None = None
    bias: Bias | None = None
    early_bias: Bias | None = None
    matcher: Matcher | None = None
    lookup: Lookup | None = None

    known: list[int] = field(default_factory=list)
    stored: int = 0
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    indexed: int = 0
    followers: list[Request] = field(default_factory=list)
    preemptions: int = 0
    admitted: bool = False
    ending: FinishReason | None = None
    finish_reason: FinishReason | None = None
    failure: Exception | None = None
    outbox: SimpleQueue[Chunk] = field(default_factory=SimpleQueue)
    listener: Listener | None = None

    arrival: int = field(default_factory=lambda: next(_arrivals))
    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    first_token_at: float | None = None
    latest_token_at: float | None = None

    def __post_init__(self) -> None:
        self.known = list(self.prompt)

    @property
    def order(self) -> tuple[int, int]:
        """Smaller goes first."""
        return self.priority, self.arrival

    @property
    def root(self) -> Hashable:
        """What keys and values depend on beside the tokens."""
        return ("root", self.alpha, self.logn, None if self.adapter is None else self.adapter.number)

    @property
    def reply(self) -> Sequence[int]:
        return self.known[len(self.prompt) :]

    def reply_end(self, count: int) -> Sequence[int]:
        """The reply's last tokens, at most `count`."""
        return self.known[max(len(self.prompt), len(self.known) - count) :]

    @property
    def reply_length(self) -> int:
        return len(self.known) - len(self.prompt)

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
        return len(self.prompt) + (self.max_new_tokens if self.reader is None else 0)

    @property
    def writes(self) -> bool:
        """Whether all but the newest token is stored: each step then adds to the reply."""
        return self.reader is None and self.stored == len(self.known) - 1 and self.reply_length > 0

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
            prefill_tokens=len(self.prompt) - self.cached,
            decode_tokens=max(self.reply_length - 1, 0),
        )
