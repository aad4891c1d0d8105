"""Submits prompts, and reads what comes: from the engine's chunks to what all families of endpoints tell of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from qwenlet.config import SamplingParams
from qwenlet.engine import AsyncStreams, Chunk, Completion
from qwenlet.engine.request import Request
from qwenlet.sampling import TokenLogprob
from qwenlet.server.service import Client, Service
from qwenlet.tokenizer import Tokenizer

Batch = list[tuple[int, Chunk]]


def held(service: Service, client: Client, requests: int, param: str = "n") -> ExitStack:
    """Places for so many requests, given back when the stack is closed. Raises ApiError as `Service.room`."""
    stack = ExitStack()
    stack.enter_context(service.room(client, requests, param))
    return stack


async def submit(
    service: Service,
    client: Client,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    held: ExitStack,
    *,
    model: str | None,
    priority: int = 0,
) -> list[Request]:
    """Queues all prompts, n requests each: number prompt * n + choice; they are cancelled when `held` is closed.
    `model`: what was asked for, the model or one of its adapters.

    Compiling a grammar stays off the event loop.
    """
    engine, timeout = service.llm.engine, service.config.request_timeout
    params = replace(params, adapter=service.adapter(model))
    requests: list[Request] = []

    def end() -> None:
        for request in requests:
            engine.cancel(request)
        service.limits.spend(client.name, sum(request.reply_length for request in requests))

    held.callback(end)

    def enter() -> None:
        for ids in prompts:
            requests.extend(engine.submit(ids, params, priority=priority, timeout=timeout))

    entering = asyncio.ensure_future(asyncio.to_thread(enter))
    try:
        await asyncio.shield(entering)
    except asyncio.CancelledError:  # the client has gone, but the thread may still submit
        await asyncio.gather(entering, return_exceptions=True)
        raise
    service.limits.spend(client.name, sum(map(len, prompts)))
    return requests


@contextmanager
def reading(service: Service, requests: Sequence[Request]) -> Iterator[AsyncStreams]:
    """The requests' streams; what has not ended at the block's end is cancelled."""
    # silence towards the client is looked at so often: it may have begun before the engine's
    streams = service.llm.engine.astreams(requests, service.config.ping_interval / 4)
    try:
        yield streams
    finally:
        streams.close()


async def ended(service: Service, requests: Sequence[Request]) -> None:
    """Waits for requests that have no reply."""
    with reading(service, requests) as streams:
        while not streams.ended:
            await streams.next()


async def batches(service: Service, requests: Sequence[Request]) -> AsyncGenerator[Batch, None]:
    """Chunks as they come; an empty batch where nothing came for a while."""
    with reading(service, requests) as streams:
        while not streams.ended:
            yield await streams.next()


async def completions(service: Service, requests: Sequence[Request]) -> list[Completion]:
    """The whole replies, in the order of the requests."""
    parts: list[list[Chunk]] = [[] for _ in requests]
    with reading(service, requests) as streams:
        while not streams.ended:
            for number, chunk in await streams.next():
                parts[number].append(chunk)
    return [Completion.from_chunks(chunks) for chunks in parts]


# ------------------------------------------------------------------------------------------------------- told of them


def usage(last: Iterable[Chunk | Completion], choices: int) -> dict[str, Any]:
    """Counts of all replies; the prompt of several choices counts once."""
    every = list(last)
    prompt = sum(one.prompt_tokens for one in every[::choices])
    written = sum(one.completion_tokens for one in every)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in every[::choices])},
    }


def timings(one: Chunk | Completion) -> dict[str, Any]:
    """Milliseconds and speeds, as clients of llama-server read them."""
    took = one.timings
    prefill, decode = (took.prefill_seconds or 0.0) * 1e3, (took.decode_seconds or 0.0) * 1e3
    return {
        "cache_n": one.cached_tokens,
        "prompt_n": took.prefill_tokens,
        "prompt_ms": prefill,
        "prompt_per_second": took.prefill_tokens_per_second,
        "predicted_n": one.completion_tokens,
        "predicted_ms": decode,
        "predicted_per_second": took.decode_tokens_per_second,
    }


def progress(chunk: Chunk) -> dict[str, Any]:
    return {"total": chunk.prompt_tokens, "cache": chunk.cached_tokens, "processed": chunk.prompt_done}


def finish_reason(chunk: Chunk | Completion) -> str | None:
    """The engine's own words are OpenAI's, but for an end that nobody asked for."""
    return "stop" if chunk.finish_reason == "cancelled" else chunk.finish_reason


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Without the token that ends a reply, which is no part of its text."""
    content = [
        _entry(tokenizer, each.token_id, each.logprob)
        | {"top_logprobs": [_entry(tokenizer, id, logprob) for id, logprob in each.top]}
        for each in entries
        if not tokenizer.is_special(each.token_id)
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([id])
    return {"token": text, "logprob": logprob, "bytes": list(tokenizer.decoded_bytes(id))}
