"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request
from msgspec import UNSET, Meta, Struct
from starlette.responses import Response

from qwenlet.config import SamplingParams
from qwenlet.engine import Chunk, Completion
from qwenlet.engine.request import Request as EngineRequest
from qwenlet.server import replies
from qwenlet.server.bodies import post
from qwenlet.server.dialogue import ChatMessage, Delta, Dialogue, converse
from qwenlet.server.errors import ApiError
from qwenlet.server.events import DONE, PING, EventStream, event
from qwenlet.server.fields import Anything, Count, SamplingFields, ignored, only, sampling, stop_texts, unsupported
from qwenlet.server.service import Service


class JsonSchema(Struct, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str | None, ignored("the model is held to the schema, not told of it")] = None
    description: Annotated[str | None, ignored("the model is held to the schema, not told of it")] = None
    schema: dict[str, Any] | None = None
    strict: Annotated[bool | None, ignored("a schema always holds")] = None


class ResponseFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """text, json_object or json_schema; llama-server's flat `schema` is understood, too."""

    type: str
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """The assistant's next message."""

    messages: list[ChatMessage]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    timings_per_token: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Annotated[Anything, ignored("no call is made without tools")] = UNSET
    store: Annotated[Anything, ignored("nothing is kept here")] = UNSET
    metadata: Annotated[Anything, ignored("nothing is kept here")] = UNSET
    service_tier: Annotated[Anything, ignored("there is one")] = UNSET
    reasoning_effort: Annotated[Anything, ignored("the model does not think first")] = UNSET
    verbosity: Annotated[Anything, ignored("the model was not taught it")] = UNSET
    safety_identifier: Annotated[Anything, ignored("clients are told apart by their keys")] = UNSET
    prompt_cache_key: Annotated[Anything, ignored("prompts that begin alike are found without")] = UNSET
    prompt_cache_retention: Annotated[Anything, ignored("the cache keeps what has room")] = UNSET
    chat_template_kwargs: Annotated[Anything, ignored("the format has no settings")] = UNSET
    modalities: Annotated[Anything, ignored("replies are text")] = UNSET
    audio: Annotated[Anything, unsupported("the model writes text alone")] = UNSET
    prediction: Annotated[Anything, unsupported("guesses come from the conversation alone")] = UNSET
    web_search_options: Annotated[Anything, unsupported("the server opens no connections")] = UNSET
    chat_template: Annotated[Anything, unsupported("the format is the checkpoint's")] = UNSET
    echo: Annotated[bool | None, only(False, "a conversation is not given back")] = None
    moderation: Annotated[Anything, unsupported("nothing moderates")] = UNSET
    prompt_cache_options: Annotated[Anything, ignored("the cache keeps what has room")] = UNSET
    json_schema: Annotated[dict[str, Any] | None, Meta(description="llama-server's.")] = None
    functions: Annotated[Anything, unsupported("tools are not built yet")] = UNSET
    function_call: Annotated[Anything, unsupported("tools are not built yet")] = UNSET


def add(app: FastAPI, service: Service) -> None:
    async def complete(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        dialogue = await asyncio.to_thread(_dialogue, service, body)
        params = _params(service, body, dialogue)
        with replies.held(service, params.n) as held:
            requests = await replies.submit(service, [dialogue.ids], params, held, priority=body.priority or 0)
            if body.stream:
                return EventStream(_stream(service, body, dialogue, requests), held.pop_all())
            done = await replies.completions(service, requests)
            return Response(msgspec.json.encode(_whole(service, body, dialogue, done)), media_type="application/json")

    post(app, "/v1/chat/completions", ChatRequest, complete)


def _dialogue(service: Service, body: ChatRequest) -> Dialogue:
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError(400, "continue_final_message and add_generation_prompt exclude each other")
    return converse(
        service.llm,
        body.messages,
        body.tools,
        body.tool_choice,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message),
    )


def _params(service: Service, body: ChatRequest, dialogue: Dialogue) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    more: dict[str, Any] = {
        "max_new_tokens": body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "stop": (*stop_texts(body), *dialogue.stop),
    }
    if dialogue.grammar is not None:
        more[dialogue.grammar.kind] = dialogue.grammar.source
    elif (wanted := body.response_format) is not None:
        more |= _format(wanted)
    elif body.json_schema is not None:
        more["json_schema"] = body.json_schema
    return sampling(body, **more)


def _format(wanted: ResponseFormat) -> dict[str, Any]:
    schema = wanted.schema if wanted.json_schema is None else wanted.json_schema.schema
    if wanted.type == "text":
        return {}
    if wanted.type not in ("json_object", "json_schema"):
        words = f"response_format.type is {wanted.type!r:.80}, expected text, json_object or json_schema"
        raise ApiError(400, words, param="response_format.type")
    if schema is not None:
        return {"json_schema": schema}
    if wanted.type == "json_schema":
        raise ApiError(400, "response_format has no schema", param="response_format.json_schema.schema")
    return {"json_object": True}


# ------------------------------------------------------------------------------------------------------------- answers


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.names[0],
        "system_fingerprint": None,
    }


def _whole(service: Service, body: ChatRequest, dialogue: Dialogue, done: Sequence[Completion]) -> dict[str, Any]:
    choices = []
    for number, one in enumerate(done):
        reader = dialogue.reader()
        text = reader.push(one.text).text + reader.finish().text
        choices.append(
            {
                "index": number,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": _logprobs(service, body, one),
                "finish_reason": replies.finish_reason(one),
            }
        )
    answer = _head(service, "chat.completion")
    return answer | {"choices": choices, "usage": replies.usage(done, len(done)), "timings": replies.timings(done[0])}


def _logprobs(service: Service, body: ChatRequest, one: Chunk | Completion) -> dict[str, Any] | None:
    return replies.chat_logprobs(service.llm.tokenizer, one.logprobs or ()) if body.logprobs else None


async def _stream(
    service: Service, body: ChatRequest, dialogue: Dialogue, requests: Sequence[EngineRequest]
) -> AsyncGenerator[bytes, None]:
    head, options = _head(service, "chat.completion.chunk"), body.stream_options
    counted = options is not None and bool(options.include_usage)
    always = options is not None and bool(options.continuous_usage_stats)
    readers = [dialogue.reader() for _ in requests]
    last: dict[int, Chunk] = {}

    def chunk(number: int, delta: dict[str, Any], one: Chunk | None = None, reason: str | None = None) -> bytes:
        logprobs = None if one is None else _logprobs(service, body, one)
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        data = head | {"choices": [choice]}
        if counted:
            data["usage"] = replies.usage([one], 1) if always and one is not None else None
        if one is not None and body.return_progress and not one.completion_tokens:
            data["prompt_progress"] = replies.progress(one)
        if one is not None and (body.timings_per_token or reason is not None):
            data["timings"] = replies.timings(one)
        return event(data)

    for number in range(len(requests)):
        yield chunk(number, {"role": "assistant", "content": ""})
    async for batch in replies.batches(service, requests):
        if not batch:
            yield PING
        for number, one in batch:
            last[number] = one
            reader = readers[number]
            delta = reader.push(one.text)
            if one.finish_reason is not None:
                rest = reader.finish()
                delta = Delta(delta.text + rest.text, delta.calls + rest.calls)
            waiting = body.return_progress and not one.completion_tokens
            if delta.text or waiting or (one.logprobs and body.logprobs):
                yield chunk(number, {"content": delta.text} if delta.text else {}, one)
            if one.finish_reason is not None:
                reason = "tool_calls" if reader.called else replies.finish_reason(one)
                yield chunk(number, {}, replace(one, logprobs=()), reason)
    if counted:
        yield event(head | {"choices": [], "usage": replies.usage(last.values(), len(requests))})
    yield DONE
