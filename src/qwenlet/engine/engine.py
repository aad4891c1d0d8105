"""The loop: schedule -> run -> sample -> emit. Everything that generates goes through `step()`.

`step` may be called by hand; a stream starts the engine's own thread, which then calls it (`driver`). Submitting and
cancelling are quick from any thread: the lock is not held while the model runs.
"""

from __future__ import annotations

import copy
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwenlet.cache import PagePool, pages_for
from qwenlet.config import DEFAULT_NEW_TOKENS, EngineConfig, GenerationDefaults, SamplingParams
from qwenlet.engine.decoding import make_decoding, way_to_decode
from qwenlet.engine.driver import Driver, Health
from qwenlet.engine.intake import check_ids, check_prompt
from qwenlet.engine.pooling import MeanState
from qwenlet.engine.prefix import PrefixCache
from qwenlet.engine.records import FinishReason
from qwenlet.engine.replies import Replies, line
from qwenlet.engine.request import Reader, Request
from qwenlet.engine.runner import Runner
from qwenlet.engine.scheduler import Limits, Scheduler, Work
from qwenlet.engine.sizing import cache_dtype, context_and_pages, out_of_memory
from qwenlet.engine.speculation import GUESSES, Lookup, Speculation
from qwenlet.engine.stats import Stats
from qwenlet.engine.stop import StopTexts, StopTokens
from qwenlet.engine.streams import AsyncStream, AsyncStreams, Stream
from qwenlet.errors import ContextLengthError, DeadlineError, EngineError, RequestError
from qwenlet.grammar import Grammars
from qwenlet.lora.rows import LoadedAdapter
from qwenlet.model import Qwen
from qwenlet.program import obstacle
from qwenlet.sampling import TokenCounts, bias_of, needs_counts
from qwenlet.tokenizer import StreamDecoder, Tokenizer

# From here on pages of old prefixes are used again before more of the cache comes into memory.
_SOFT_TOKENS = 8192
_FAILURES_IN_A_ROW = 3  # of steps, until the engine calls itself unhealthy


class Engine:
    """Serves requests together.

    Attributes:
        obstacle: why replies run neither by the native program nor by a GPU's kernels; None where they do.
        context_length: most tokens of one request.

    Args:
        tokenizer: None for a checkpoint without one: ids in, ids out, no text.
        stop_ids: end tokens of this model beside those of its generation config (a chat model's <|im_end|>).
    """

    def __init__(
        self,
        model: Qwen,
        tokenizer: Tokenizer | None,
        options: EngineConfig,
        defaults: GenerationDefaults,
        device: torch.device,
        stop_ids: Sequence[int] = (),
    ) -> None:
        dtype = cache_dtype(model, options.kv_cache)
        self.model, self.tokenizer, self.options, self.defaults = model, tokenizer, options, defaults
        self.device = device
        self.context_length, pages = context_and_pages(model.config, options, dtype, device)
        self.stop_ids = frozenset([*defaults.eos_token_ids, *stop_ids])
        how, why = way_to_decode(model, options, dtype, device)
        self.obstacle = obstacle(model, dtype) if how is None else why
        self.pool = PagePool(model.config, pages, dtype, device, tiled=how is None and self.obstacle is None)
        self.prefix = PrefixCache(self.pool) if options.prefix_cache else None
        replies = options.max_requests + GUESSES
        decoding = make_decoding(how, model, self.pool, options.max_requests, pages_for(self.context_length), device)
        chunk, mixed = options.chunks(device.type)
        self.runner = Runner(model, self.pool, device, options.attention, chunk + replies, decoding)
        prompt = self.runner.step - replies
        limits = Limits(options.max_requests, prompt, min(mixed, prompt), ahead=0 if decoding is None else 1)
        self.scheduler = Scheduler(self.pool, self.prefix, limits, pages_for(_SOFT_TOKENS))
        # a decode program stores one token a step: guesses would run by the modules
        self.speculation = Speculation() if options.speculate and decoding is None else None
        self._stats = Stats(pages=pages)
        self._replies = Replies(self.scheduler, self.prefix, self.speculation, self._stats)
        self._grammars = None if tokenizer is None else Grammars(tokenizer, model.config.vocab_size, self.stop_ids)
        self._lock = threading.RLock()
        self._in_flight: frozenset[Request] = frozenset()
        self._failures, self._reason = 0, ""
        self._adapters: dict[str, LoadedAdapter] = {}
        self._driver = Driver(self)

    # ---------------------------------------------------------------------------------------------- requests

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        dropped_turns: int = 0,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[Request]:
        """Queues a prompt and returns its `params.n` requests.

        Args:
            priority: lower goes first.
            timeout: seconds after which what has not ended fails.
        Raises:
            RequestError: an empty prompt, an id outside the vocabulary, a stop text or a grammar without a tokenizer, a
                grammar that doesn't compile.
            ContextLengthError: prompt and reply don't fit.
            EngineError: the engine was shut down.
        """
        ids = check_prompt(prompt, self.model.config.vocab_size)
        if params.n > self.options.max_requests:
            raise RequestError(f"n is {params.n}, but {self.options.max_requests} requests run at once (max_requests)")
        if timeout is not None and not timeout > 0.0:
            raise RequestError(f"timeout is {timeout!r}, expected seconds above 0")
        reserved = params.max_new_tokens
        resolved = params.resolve(self.defaults)
        adapter = self.adapter(params.adapter)
        room = self.context_length - len(ids)
        if room < (reserved or 1):
            raise ContextLengthError(len(ids), self.context_length, reserved or 1)
        if isinstance(resolved.logit_bias, Mapping):
            check_ids("logit_bias", resolved.logit_bias, self.model.config.vocab_size)
        if resolved.min_new_tokens > (reserved or room):
            raise RequestError(
                f"min_new_tokens is {resolved.min_new_tokens}, but {reserved or room} tokens are allowed"
            )
        if resolved.stop and self.tokenizer is None:
            raise RequestError("stop texts need a tokenizer, and this model has none", hint="use stop_token_ids")
        if resolved.grammar is not None and self._grammars is None:
            raise RequestError("a grammar needs a tokenizer, and this model has none")
        limit = reserved or min(room, resolved.max_new_tokens or DEFAULT_NEW_TOKENS)
        seed = secrets.randbits(32) if resolved.seed is None else resolved.seed
        resolved = replace(resolved, max_new_tokens=limit, seed=seed)
        alpha = self.ntk_alpha(len(ids), limit)
        requests = self._choices(ids, resolved, alpha)
        for request in requests:
            request.dropped_turns, request.priority, request.timeout = dropped_turns, priority, timeout
            request.adapter = adapter
        leader, *leader.followers = requests
        self._enter(leader)
        return requests

    def ntk_alpha(self, prompt: int, reply: int) -> float:
        """The dynamic NTK factor of a request with so many tokens, whose reply may have so many."""
        return self.model.config.ntk_alpha(prompt + (reply if self.options.ntk == "reserve" else 0))

    def _choices(self, prompt: tuple[int, ...], params: SamplingParams, alpha: float) -> list[Request]:
        own = () if params.ignore_eos else self.stop_ids
        sequences = () if params.ignore_eos else self.defaults.stop_words_ids
        grammar = None
        if params.grammar is not None:
            assert self._grammars is not None, "a grammar was refused without a tokenizer"
            grammar = self._grammars.compile(params.grammar)
        stop_tokens = StopTokens([*own, *(params.stop_token_ids or ())], sequences)
        vocab_size = self.model.config.vocab_size
        bias = bias_of(params, vocab_size)
        early_bias = bias_of(params, vocab_size, stop_tokens.ids) if params.min_new_tokens else bias
        return [
            Request(
                prompt=prompt,
                params=params,
                alpha=alpha,
                stop_tokens=stop_tokens,
                stop_texts=StopTexts(tuple(params.stop or ())),
                decoder=None if self.tokenizer is None else StreamDecoder(self.tokenizer, skip_special_tokens=True),
                choice=choice,
                counts=TokenCounts(prompt) if needs_counts(params) else None,
                bias=bias,
                early_bias=early_bias,
                matcher=None if grammar is None else grammar.matcher(),
            )
            for choice in range(params.n)
        ]

    def read(
        self,
        ids: Sequence[int],
        alpha: float,
        first: int,
        reader: Reader,
        *,
        logn: bool = True,
        priority: int = 0,
        timeout: float | None = None,
        adapter: str | None = None,
        hidden: bool = False,
    ) -> Request:
        """Queues ids whose logits from position `first` on `reader` gets, piece by piece, on the model's device.

        With `hidden` it gets the last hidden states, normed, of all positions instead. Without `logn` the model reads
        as one that has no log-n attention.
        """
        assert not (hidden and first), "hidden states are read from the first position on"
        if len(ids) > self.context_length:
            raise ContextLengthError(len(ids), self.context_length, 0)
        request = Request(
            prompt=tuple(ids),
            params=SamplingParams(max_new_tokens=1, seed=0),
            alpha=alpha,
            stop_tokens=StopTokens(()),
            stop_texts=StopTexts(()),
            logn=logn,
            reader=reader,
            read_from=first,
            reads_hidden=hidden,
            priority=priority,
            timeout=timeout,
            adapter=self.adapter(adapter),
        )
        self._enter(request)
        return request

    def logits(self, ids: Sequence[int], alpha: float, first: int = 0, *, adapter: str | None = None) -> Tensor:
        """Float32 logits [len(ids) - first, V] on the CPU from position `first` on, by the kernels that generate."""
        parts: list[Tensor] = []
        request = self.read(ids, alpha, first, lambda _, logits: parts.append(logits.cpu()), adapter=adapter)
        for _ in self.stream(request):
            pass
        return torch.cat(parts)

    def embed(
        self, ids: Sequence[int], alpha: float, *, priority: int = 0, timeout: float | None = None,
        adapter: str | None = None,
    ) -> tuple[Request, MeanState]:  # fmt: skip
        """Queues ids whose hidden states are averaged; the mean is there when the request has ended."""
        state = MeanState()
        request = self.read(ids, alpha, 0, state, priority=priority, timeout=timeout, hidden=True, adapter=adapter)
        return request, state

    # ---------------------------------------------------------------------------------------------- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return tuple(self._adapters)

    def adapter(self, name: str | None) -> LoadedAdapter | None:
        """Raises RequestError for a name that no loaded adapter has."""
        if name is None:
            return None
        adapters = self._adapters  # one look: another thread may put a new table in its place
        if name not in adapters:
            loaded = f"loaded are {', '.join(adapters)}" if adapters else "none is loaded"
            raise RequestError(
                f"adapter is {name!r:.200}, but {loaded}",
                hint="load it with --adapter NAME=DIR, or llm.add_adapter(name, folder)",
            )
        return adapters[name]

    def add_adapter(self, adapter: LoadedAdapter) -> None:
        """Lets requests ask for an adapter, in place of one that had its name. What runs goes on with the old one."""
        with self._lock:
            self._set_adapters(self._adapters | {adapter.name: adapter})

    def remove_adapter(self, name: str) -> None:
        """Raises RequestError if there is none of that name. What runs goes on with it."""
        self.adapter(name)
        with self._lock:
            self._set_adapters({other: one for other, one in self._adapters.items() if other != name})

    def _set_adapters(self, adapters: dict[str, LoadedAdapter]) -> None:
        self._adapters = adapters
        self.runner.wanted = tuple(adapters.values())

    def _check_takes(self) -> None:
        if self._driver.closed or self._driver.draining:
            raise EngineError("the engine is shut down, or about to be", hint="load the model again")

    def _enter(self, request: Request) -> None:
        with self._lock:
            self._check_takes()
            self.scheduler.add(request)
        self._driver.wake()

    def cancel(self, request: Request) -> None:
        """Ends a request and frees its pages, at the latest when the step that runs ends. Harmless if it has ended."""
        self._end(request, "cancelled")

    def stop(self, request: Request) -> None:
        """The same for a reply that holds all that is wanted: it has ended well, as by a stop text."""
        self._end(request, "stop")

    def _end(self, request: Request, reason: FinishReason) -> None:
        with self._lock:
            if request.finish_reason is not None:
                return
            if request in self._in_flight:
                request.ending = request.ending or reason
                return
            self._replies.finish(request, reason)
            self._replies.tell()

    def stream(self, request: Request) -> Stream:
        """The request's chunks; the engine's thread runs from now on."""
        self.start()
        return Stream(self, request)

    def astream(self, request: Request) -> AsyncStream:
        """The same for the event loop that runs here."""
        self.start()
        return AsyncStream(self, request)

    def astreams(self, requests: Sequence[Request], patience: float | None = None) -> AsyncStreams:
        """Several requests read together, for the event loop that runs here; `patience` as AsyncStreams has it."""
        self.start()
        return AsyncStreams(self, requests, patience)

    # ---------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Starts the thread that steps. Harmless the second time."""
        self._driver.start()

    @property
    def alive(self) -> bool:
        return self._driver.alive

    @property
    def health(self) -> Health:
        healthy = self._failures < _FAILURES_IN_A_ROW and not self._driver.closed
        return Health(healthy, self._reason, self._driver.beat_seconds)

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those that came; False if they took longer than `timeout` seconds."""
        return self._driver.drain(timeout)

    def close(self) -> None:
        """Cancels what has not ended and ends the thread. Harmless the second time."""
        self._driver.close()
        self._end_all("cancelled", None)
        self.runner.close()

    def _end_all(self, reason: FinishReason, error: Exception | None) -> None:
        with self._lock:
            while requests := [*self.scheduler.running, *self.scheduler.waiting]:
                for request in requests:
                    request.failure = request.failure or error
                    self._replies.finish(request, reason, error=None if error is None else line(error))
            self._replies.tell()

    # ---------------------------------------------------------------------------------------------- the step

    def died(self, error: BaseException) -> None:
        """The thread ends by an error that is nobody's: nobody is left waiting for an answer that can't come."""
        self._reason = f"{type(error).__name__}: {error}"
        self._end_all("error", EngineError(f"the engine stopped: {self._reason}", hint="load the model again"))

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> bool:
        """Runs the model once; False if there was nothing to run."""
        began = time.perf_counter()
        with self._lock:
            self._expire(began)
            guess = self._guess if self.speculation is not None and self.speculation.wanted() else None
            work = self.scheduler.schedule(guess)
            for one in work:
                one.request.started_at = one.request.started_at or began
            self._in_flight = frozenset(one.request for one in work)
            # of the step before, and only now: woken loops hold this thread's Python up, but not the model
            self._replies.tell()
        if not work:
            return False
        scheduled = time.perf_counter()
        try:
            logits = self.runner.run(work)
        except Exception as error:
            self._fail(work, error)
            return True
        except BaseException:
            with self._lock:
                self._in_flight = frozenset()  # the same work may be done again
            raise
        ran = time.perf_counter()
        with self._lock:
            self._in_flight = frozenset()
            self._failures, self._reason = 0, ""
            drawn = self._replies.draw_ahead(work, logits) | self.runner.drawn
            for one, rows in zip(work, logits, strict=True):
                self._replies.take(one, rows, ran - scheduled, drawn.get(one.request))
            self._stats.steps += 1
            self._stats.seconds["schedule"] += scheduled - began
            self._stats.seconds["run"] += ran - scheduled
            self._stats.seconds["sample"] += time.perf_counter() - ran
        return True

    def _guess(self, request: Request) -> Sequence[int]:
        if request.matcher is not None:
            return ()
        if request.lookup is None:
            request.lookup = Lookup(request.known)
        return request.lookup.guess(min(GUESSES, request.max_new_tokens - request.reply_length - 1))

    def _expire(self, now: float) -> None:
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            for one in (request, *request.followers):
                if one.timeout is not None and now - one.submitted_at > one.timeout:
                    self._replies.give_up(one, DeadlineError(f"the request did not end within its {one.timeout:.3g} s"))

    def _fail(self, work: Sequence[Work], error: Exception) -> None:
        """A step that raised ends its requests, each with the reason; the others go on."""
        if isinstance(error, torch.OutOfMemoryError):
            # what grew with the step goes; single tokens need next to nothing, and are tried again
            work = [one for one in work if len(one.tokens) > 1] or work
            error = out_of_memory(error, self.device)
        with self._lock:
            self._in_flight = frozenset()
            self._failures += 1
            self._reason = line(error)
            self._stats.failed_steps += 1
            self.runner.recover()
            for one in work:
                for request in (one.request, *one.request.followers):
                    self._replies.give_up(request, error)

    @property
    def stats(self) -> Stats:
        """Counters, as they are now."""
        with self._lock:
            used = self.pool.pages - self.pool.free_pages
            cached = 0 if self.prefix is None else self.prefix.idle
            speculation = self.speculation or Speculation()
            return replace(
                copy.deepcopy(self._stats),
                running=len(self.scheduler.running),
                waiting=sum(1 + len(request.followers) for request in self.scheduler.waiting),
                pages_used=used - cached,
                pages_cached=cached,
                asked_tokens=0 if self.prefix is None else self.prefix.asked,
                cached_tokens=0 if self.prefix is None else self.prefix.found,
                preemptions=self.scheduler.preemptions,
                guessed=speculation.drafted,
                accepted=speculation.accepted,
            )
