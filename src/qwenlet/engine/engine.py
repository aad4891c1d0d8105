"""The loop: schedule -> run -> sample -> emit. Everything that generates goes through `step()`."""

from __future__ import annotations

import operator
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from qwenlet.cache import PagePool, pages_for
from qwenlet.config import DEFAULT_NEW_TOKENS, EngineConfig, GenerationDefaults, ModelConfig, SamplingParams
from qwenlet.engine.records import Chunk, FinishReason
from qwenlet.engine.request import Request
from qwenlet.engine.runner import Runner
from qwenlet.engine.scheduler import Scheduler
from qwenlet.engine.stop import StopTexts, StopTokens
from qwenlet.errors import ConfigError, ContextLengthError, RequestError
from qwenlet.linear import QuantLinear
from qwenlet.model import Qwen
from qwenlet.program import obstacle
from qwenlet.sampling import TokenCounts, TokenLogprob, choose, needs_counts, token_logprob
from qwenlet.tokenizer import StreamDecoder, Tokenizer


class Engine:
    """Serves requests one row a step.

    Attributes:
        obstacle: why the forward pass is not the native program's; None where it is.

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
        limit = model.config.context_length
        cache_dtype = _cache_dtype(model, options.kv_cache)
        if options.max_context is not None and options.max_context > limit:
            raise ConfigError(
                f"max_context is {options.max_context}, but this model has published maths for {limit} positions",
                hint=f"use max_context={limit} or less",
            )
        self.model, self.tokenizer, self.options, self.defaults = model, tokenizer, options, defaults
        self.device = device
        self.context_length = options.max_context or _affordable(model.config, cache_dtype, device)
        self.stop_ids = frozenset([*defaults.eos_token_ids, *stop_ids])
        self.obstacle = obstacle(model, cache_dtype) if device.type == "cpu" else "the native program is for a CPU"
        native = self.obstacle is None
        self.pool = PagePool(model.config, pages_for(self.context_length), cache_dtype, device, tiled=native)
        self.scheduler = Scheduler(self.pool)
        self.runner = Runner(model, self.pool, device, options.attention, options.prefill_chunk)
        self._lock = threading.RLock()

    # ---------------------------------------------------------------------------------------------- requests

    def submit(self, prompt: Sequence[int], params: SamplingParams, *, dropped_turns: int = 0) -> list[Request]:
        """Queues a prompt and returns its `params.n` requests.

        Raises:
            RequestError: an empty prompt, an id outside the vocabulary, a stop text without a tokenizer.
            ContextLengthError: prompt and reply don't fit.
        """
        prompt = self.check_prompt(prompt)
        reserved = params.max_new_tokens
        resolved = params.resolve(self.defaults)
        room = self.context_length - len(prompt)
        if room < (reserved or 1):
            raise ContextLengthError(len(prompt), self.context_length, reserved or 1)
        if resolved.stop and self.tokenizer is None:
            raise RequestError("stop texts need a tokenizer, and this model has none", hint="use stop_token_ids")
        limit = reserved or min(room, resolved.max_new_tokens or DEFAULT_NEW_TOKENS)
        seed = secrets.randbits(32) if resolved.seed is None else resolved.seed
        resolved = replace(resolved, max_new_tokens=limit, seed=seed)
        alpha = self.model.config.ntk_alpha(len(prompt) + (limit if self.options.ntk == "reserve" else 0))
        requests = [self._request(prompt, resolved, alpha, choice, dropped_turns) for choice in range(params.n)]
        with self._lock:
            for request in requests:
                self.scheduler.add(request)
        return requests

    def check_prompt(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The ids as plain numbers. Raises RequestError if there are none, or one is not of this vocabulary."""
        try:
            ids = tuple(operator.index(token) for token in prompt)
        except TypeError:
            raise RequestError(f"a prompt is text or a list of token ids, not {prompt!r:.80}") from None
        if not ids:
            raise RequestError("the prompt is empty", hint="give at least one token")
        size = self.model.config.vocab_size
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise RequestError(f"the prompt has token id {wrong}, but this model knows 0 to {size - 1}")
        return ids

    def _request(
        self, prompt: tuple[int, ...], params: SamplingParams, alpha: float, choice: int, dropped_turns: int
    ) -> Request:
        own = () if params.ignore_eos else self.stop_ids
        sequences = () if params.ignore_eos else self.defaults.stop_words_ids
        return Request(
            prompt=prompt,
            params=params,
            alpha=alpha,
            stop_tokens=StopTokens([*own, *(params.stop_token_ids or ())], sequences),
            stop_texts=StopTexts(tuple(params.stop or ())),
            decoder=None if self.tokenizer is None else StreamDecoder(self.tokenizer, skip_special_tokens=True),
            choice=choice,
            dropped_turns=dropped_turns,
            counts=TokenCounts(prompt, self.model.config.vocab_size, self.device) if needs_counts(params) else None,
        )

    def logits(self, ids: Sequence[int], alpha: float, first: int = 0) -> torch.Tensor:
        """Float32 logits [len(ids) - first, V] on the CPU from position `first` on, by the kernels that generate.

        Raises:
            RequestError: running requests hold the pages that this needs.
        """
        with self._lock:
            if self.pool.free_pages < pages_for(len(ids)):
                raise RequestError(
                    f"{len(ids)} tokens need {pages_for(len(ids))} pages of the cache, {self.pool.free_pages} are free",
                    hint="let the running requests end first",
                )
            return self.runner.logits(ids, alpha, first)

    def cancel(self, request: Request) -> None:
        """Ends a request at once and frees its pages. Harmless if it has ended already."""
        with self._lock:
            if request.finish_reason is None:
                self._finish(request, "cancelled", [], None)

    def stream(self, request: Request) -> Stream:
        """The request's chunks, stepping the engine while none is ready."""
        return Stream(self, request)

    # ---------------------------------------------------------------------------------------------- the step

    def step(self) -> bool:
        """Runs one request for one step; False if there was nothing to run."""
        with self._lock:
            request = self.scheduler.schedule()
            if request is None:
                return False
            try:
                self._advance(request)
            except Exception as error:
                # the failing request fails alone: its own stream raises, the others go on
                request.failure = error
                self._finish(request, "error", [], None, f"{type(error).__name__}: {error}")
            return True

    def _advance(self, request: Request) -> None:
        if request.started_at is None:
            request.started_at = time.perf_counter()
        tokens = request.next_tokens(self.runner.chunk)
        logits = self.runner.run(request, tokens)
        if logits is None:
            request.stored += len(tokens)
            self._emit(request, "", [], None)
            return

        position = len(request.prompt) + len(request.reply)
        token = choose(logits, request.params, request.counts, request.choice, position)
        request.latest_token_at = time.perf_counter()
        if request.first_token_at is None:
            request.first_token_at = request.latest_token_at
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = [token_logprob(logits, token, request.params.logprobs)]
        # only now, together with its token: a Ctrl-C before this line lets the next step do the same work again
        request.stored += len(tokens)
        try:
            self._accept(request, token, logprobs)
        except BaseException:
            # half taken in: going on could lose a token, so the request ends and says why
            if request.finish_reason is None:
                self._finish(request, "error", [], None, "interrupted while a token was taken in")
            raise

    def _accept(self, request: Request, token: int, logprobs: list[TokenLogprob] | None) -> None:
        """Takes a sampled token into the reply, and ends the reply if it is the last."""
        request.reply.append(token)
        if request.counts is not None:
            request.counts.add(token)
        if request.stop_tokens.hit(request.reply):
            self._finish(request, "stop", [token], logprobs)
            return
        piece = "" if request.decoder is None else request.decoder.push(token)
        text, stopped = request.stop_texts.push(piece)
        if stopped:
            self._finish(request, "stop", [token], logprobs, text=text, flush=False)
        elif len(request.reply) >= request.max_new_tokens:
            self._finish(request, "length", [token], logprobs, text=text)
        else:
            self._emit(request, text, [token], logprobs)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        tokens: Sequence[int],
        logprobs: list[TokenLogprob] | None,
        error: str | None = None,
        *,
        text: str = "",
        flush: bool = True,
    ) -> None:
        if flush:
            tail = "" if request.decoder is None else request.decoder.flush()
            more, stopped = request.stop_texts.push(tail)
            text += more if stopped else more + request.stop_texts.flush()
        request.finish_reason = reason
        self.scheduler.remove(request)
        self._emit(request, text, tokens, logprobs, error)

    def _emit(
        self,
        request: Request,
        text: str,
        tokens: Sequence[int],
        logprobs: list[TokenLogprob] | None,
        error: str | None = None,
    ) -> None:
        wanted = request.params.logprobs is not None
        request.outbox.append(
            Chunk(
                text=text,
                token_ids=tuple(tokens),
                finish_reason=request.finish_reason,
                prompt_tokens=len(request.prompt),
                prompt_done=min(request.stored, len(request.prompt)),
                completion_tokens=len(request.reply),
                seed=request.seed,
                timings=request.timings,
                logprobs=tuple(logprobs or ()) if wanted else None,
                choice=request.choice,
                dropped_turns=request.dropped_turns,
                error=error,
            )
        )


_CACHE_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _cache_dtype(model: Qwen, asked: str) -> torch.dtype:
    """ "auto" is int8 where weights are quantized, else their precision."""
    if asked != "auto":
        return _CACHE_DTYPES[asked]
    quantized = any(isinstance(module, QuantLinear) for module in model.modules())
    return torch.int8 if quantized else next(iter(model.transformer.ln_f.parameters())).dtype


def _affordable(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """The longest context with published maths; on a GPU, where pages take their memory at once, as much of it as half
    of the free memory holds."""
    if device.type != "cuda":
        return config.context_length
    free, _ = torch.cuda.mem_get_info(device)
    return max(min(config.context_length, free // 2 // config.cache_bytes(dtype.itemsize)), 1)


class Stream(Iterator[Chunk]):
    """Chunks of one request. Closing the stream, or dropping it half-read, cancels the request.

    A request that failed raises what made it fail after its last chunk.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._ended = False

    def __next__(self) -> Chunk:
        request = self._request
        if self._ended:
            failure, request.failure = request.failure, None
            if failure is not None:
                raise failure
            raise StopIteration
        try:
            while not request.outbox:
                ran = self._engine.step()
                assert ran or request.outbox, "a request that has not ended was neither waiting nor running"
        except BaseException:  # Ctrl-C in the middle of a step
            self.close()
            raise
        chunk = request.outbox.popleft()
        self._ended = chunk.finish_reason is not None
        return chunk

    def close(self) -> None:
        """Ends the request if it hasn't ended, and frees its pages."""
        self._ended = True
        self._engine.cancel(self._request)

    def __del__(self) -> None:
        self.close()
