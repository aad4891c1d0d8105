"""POST /v1/completions: texts and token ids go on, without any chat format."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request
from msgspec import UNSET, Meta
from starlette.responses import Response

from qwenlet.api import LLM
from qwenlet.engine import Chunk, Completion
from qwenlet.engine.request import Request as EngineRequest
from qwenlet.sampling import TokenLogprob
from qwenlet.server import replies
from qwenlet.server.bodies import post
from qwenlet.server.errors import ApiError
from qwenlet.server.events import DONE, PING, EventStream, event
from qwenlet.server.fields import Anything, Count, SamplingFields, sampling, unsupported
from qwenlet.server.service import Service
from qwenlet.tokenizer import Tokenizer

DEFAULT_TOKENS = 16  # OpenAI's


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Texts go on."""

    prompt: Annotated[
        str | list[str | int | list[int]], Meta(description="A text, token ids, or a list of either, not mixed.")
    ]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: Annotated[Anything, unsupported("the model was not taught to fill gaps")] = UNSET
    best_of: Annotated[Anything, unsupported("choosing among more replies is not built yet")] = UNSET


def add(app: FastAPI, service: Service) -> None:
    async def complete(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        prompts = await asyncio.to_thread(prompt_ids, service.llm, body.prompt)
        params = sampling(body, max_new_tokens=body.max_tokens or DEFAULT_TOKENS, logprobs=body.logprobs)
        with replies.held(service, params.n * len(prompts)) as held:
            requests = await replies.submit(service, prompts, params, held, priority=body.priority or 0)
            if body.stream:
                return EventStream(_stream(service, body, params.n, requests), held.pop_all())
            done = await replies.completions(service, requests)
            return Response(msgspec.json.encode(_whole(service, params.n, done)), media_type="application/json")

    post(app, "/v1/completions", CompletionRequest, complete)


def prompt_ids(llm: LLM, prompt: str | list[Any]) -> list[list[int]]:
    """Token ids of each prompt. Raises ApiError 400 for an empty or mixed list."""
    if isinstance(prompt, str):
        return [llm.tokenizer.encode(prompt, allowed_special=set())]
    kinds = {type(one) for one in prompt}
    if len(kinds) != 1:
        seen = "empty" if not kinds else "a list of mixed kinds"
        raise ApiError(400, f"prompt is {seen}, expected texts, token ids or lists of token ids", param="prompt")
    if kinds == {int}:
        return [list(prompt)]
    if kinds == {str}:
        return [llm.tokenizer.encode(one, allowed_special=set()) for one in prompt]
    return [list(one) for one in prompt]


def _head(service: Service) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.names[0],
        "system_fingerprint": None,
    }


def _whole(service: Service, n: int, done: Sequence[Completion]) -> dict[str, Any]:
    choices = [
        {
            "index": number,
            "text": one.text,
            "logprobs": _logprobs(service.llm.tokenizer, one.logprobs, 0),
            "finish_reason": replies.finish_reason(one),
        }
        for number, one in enumerate(done)
    ]
    return _head(service) | {
        "choices": choices,
        "usage": replies.usage(done, n),
        "timings": replies.timings(done[0]),
    }


def _logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob] | None, offset: int) -> dict[str, Any] | None:
    """OpenAI's four lists. `offset`: characters of the reply before these tokens."""
    if entries is None:
        return None
    tokens = [tokenizer.decode([each.token_id]) for each in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in entries],
        "top_logprobs": [{tokenizer.decode([id]): logprob for id, logprob in each.top} for each in entries],
        "text_offset": offsets,
    }


async def _stream(
    service: Service, body: CompletionRequest, n: int, requests: Sequence[EngineRequest]
) -> AsyncGenerator[bytes, None]:
    head, options = _head(service), body.stream_options
    counted = options is not None and bool(options.include_usage)
    always = options is not None and bool(options.continuous_usage_stats)
    last: dict[int, Chunk] = {}
    written = [0] * len(requests)
    async for batch in replies.batches(service, requests):
        if not batch:
            yield PING
        for number, one in batch:
            last[number] = one
            waiting = body.return_progress and not one.completion_tokens
            if not (one.text or one.logprobs or one.finish_reason or waiting):
                continue
            choice = {
                "index": number,
                "text": one.text,
                "logprobs": _logprobs(service.llm.tokenizer, one.logprobs, written[number]),
                "finish_reason": replies.finish_reason(one),
            }
            written[number] += len(one.text)
            data = head | {"choices": [choice]}
            if counted:
                data["usage"] = replies.usage([one], 1) if always else None
            if waiting:
                data["prompt_progress"] = replies.progress(one)
            if one.finish_reason is not None:
                data["timings"] = replies.timings(one)
            yield event(data)
    if counted:
        ordered = [last[number] for number in range(len(requests))]
        yield event(head | {"choices": [], "usage": replies.usage(ordered, n)})
    yield DONE
