"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Request
from msgspec import UNSET, Meta, Struct
from starlette.responses import Response

from qwenlet.config import SamplingParams
from qwenlet.engine import Chunk, Completion
from qwenlet.engine.request import Request as EngineRequest
from qwenlet.server import parsed, replies
from qwenlet.server.bodies import json_answer, post
from qwenlet.server.declared import toolbox_of
from qwenlet.server.dialogue import ChatMessage, Delta, Dialogue, Format, converse, format_of
from qwenlet.server.errors import ApiError
from qwenlet.server.events import DONE, NOTHING, EventStream, event
from qwenlet.server.fields import (
    Account,
    Anything,
    CacheKey,
    CacheRules,
    Count,
    SamplingFields,
    SchemaNotes,
    Thinking,
    Tier,
    Verbosity,
    ignored,
    name_unstreamed,
    only,
    sampling,
    stop_texts,
    unsupported,
)
from qwenlet.server.parsed import Parsed
from qwenlet.server.service import Service


class JsonSchema(SchemaNotes, kw_only=True, forbid_unknown_fields=True):
    schema: dict[str, Any] | None = None


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
    tools: Annotated[
        list[dict[str, Any]] | None,
        Meta(description="`strict` acts where a call is forced, or a format given; fields nobody knows are refused."),
    ] = None
    tool_choice: Any = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="Left out: one call, as the model was taught.")] = None
    store: Annotated[Anything, ignored("nothing is kept here")] = UNSET
    metadata: Annotated[Anything, ignored("nothing is kept here")] = UNSET
    safety_identifier: Account = UNSET
    service_tier: Tier = UNSET
    prompt_cache_key: CacheKey = UNSET
    prompt_cache_retention: CacheRules = UNSET
    prompt_cache_options: CacheRules = UNSET
    reasoning_effort: Thinking = UNSET
    verbosity: Verbosity = UNSET
    chat_template_kwargs: Annotated[Anything, ignored("the format has no settings")] = UNSET
    modalities: Annotated[Anything, ignored("replies are text")] = UNSET
    audio: Annotated[Anything, unsupported("the model writes text alone")] = UNSET
    prediction: Annotated[Anything, unsupported("guesses come from the conversation alone")] = UNSET
    web_search_options: Annotated[Anything, unsupported("the server opens no connections")] = UNSET
    chat_template: Annotated[Anything, unsupported("the format is the checkpoint's")] = UNSET
    echo: Annotated[bool | None, only(False, "a conversation is not given back")] = None
    moderation: Annotated[Anything, unsupported("nothing moderates")] = UNSET
    json_schema: Annotated[dict[str, Any] | None, Meta(description="llama-server's.")] = None
    functions: Annotated[list[dict[str, Any]] | None, Meta(description="The old name of `tools`.")] = None
    function_call: Annotated[Any, Meta(description="The old name of `tool_choice`.")] = None


def add(app: FastAPI, service: Service) -> None:
    async def complete(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        dialogue, params = await asyncio.to_thread(_asked, service, body, request.state.ignored)
        client, priority = request.state.client, body.priority or 0
        with replies.held(service, client, params.n) as held:
            requests = await replies.submit(
                service, client, [dialogue.ids], params, held, model=body.model, priority=priority
            )
            if body.stream:
                events = _stream(service, body, dialogue, requests)
                return EventStream(events, held.pop_all(), service.config.ping_interval)
            done = await parsed.whole(service, dialogue, requests)
            return json_answer(_whole(service, body, dialogue, done))

    post(app, "/v1/chat/completions", ChatRequest, complete, prompt="messages")


def _asked(service: Service, body: ChatRequest, ignored: list[str]) -> tuple[Dialogue, SamplingParams]:
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError(400, "continue_final_message and add_generation_prompt exclude each other")
    declared = (body.tools, body.tool_choice, body.parallel_tool_calls, body.functions, body.function_call)
    dialogue = converse(
        service.llm,
        body.messages,
        toolbox_of(*declared, ignored=ignored),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message),
    )
    return dialogue, _params(body, dialogue, ignored)


def _params(body: ChatRequest, dialogue: Dialogue, ignored: list[str]) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    more: dict[str, Any] = {
        "max_new_tokens": body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "stop": (*stop_texts(body), *dialogue.stop),
    }
    answer, field = _format(body.response_format), "response_format"
    if body.json_schema is not None:
        if answer is not None:
            words = "response_format and json_schema both say what the reply is held to; give one of them"
            raise ApiError(400, words, param="json_schema")
        answer, field = Format(body.json_schema), "json_schema"
    strict = "tools[].function.strict" if body.functions is None else "functions[].strict"
    held = dialogue.held_to(answer, field, ignored, strict)
    name_unstreamed(body, ignored, "timings_per_token")
    grammar = None if not held else "tool_choice" if dialogue.must_call else field
    return sampling(body, grammar, **more | held)


def _format(wanted: ResponseFormat | None) -> Format | None:
    if wanted is None:
        return None
    schema = wanted.schema if wanted.json_schema is None else wanted.json_schema.schema
    return format_of(wanted.type, schema, "response_format", ".json_schema")


# ------------------------------------------------------------------------------------------------------------- answers


def _head(service: Service, model: str | None, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.called(model),
        "system_fingerprint": None,
    }


def _whole(service: Service, body: ChatRequest, dialogue: Dialogue, done: Sequence[Parsed]) -> dict[str, Any]:
    choices = [
        {
            "index": number,
            "message": _message(one, body.functions is not None),
            "logprobs": _logprobs(service, body, one.completion),
            "finish_reason": _reason(one.finish, body),
        }
        for number, one in enumerate(done)
    ]
    told = [one.completion for one in done]
    answer = _head(service, body.model, "chat.completion")
    return answer | {"choices": choices, "usage": replies.usage(told, len(told)), "timings": replies.timings(told[0])}


def _message(one: Parsed, legacy: bool) -> dict[str, Any]:
    content = None if one.calls and not one.text else one.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if one.thought:
        message["reasoning_content"] = one.thought
    calls = [{"name": call.name, "arguments": call.arguments} for call in one.calls]
    if calls and legacy:
        message["function_call"] = calls[0]
    elif calls:
        named = zip(one.calls, calls, strict=True)
        message["tool_calls"] = [{"id": call.id, "type": "function", "function": told} for call, told in named]
    return message


def _reason(finish: str | None, body: ChatRequest) -> str | None:
    return "function_call" if finish == "tool_calls" and body.functions is not None else finish


def _fields(delta: Delta, legacy: bool) -> list[dict[str, Any]]:
    """A stream's deltas: thoughts, text, and each piece of a call."""
    found: list[dict[str, Any]] = []
    if delta.thought:
        found.append({"reasoning_content": delta.thought})
    if delta.text:
        found.append({"content": delta.text})
    for call in delta.calls:
        function = {"arguments": call.arguments} if call.name is None else {"name": call.name, "arguments": ""}
        if legacy:
            found.append({"function_call": function})
            continue
        head = {} if call.name is None else {"id": call.id, "type": "function"}
        found.append({"tool_calls": [{"index": call.index, **head, "function": function}]})
    return found


def _logprobs(service: Service, body: ChatRequest, one: Chunk | Completion) -> dict[str, Any] | None:
    return replies.chat_logprobs(service.llm.tokenizer, one.logprobs or ()) if body.logprobs else None


async def _stream(
    service: Service, body: ChatRequest, dialogue: Dialogue, requests: Sequence[EngineRequest]
) -> AsyncGenerator[bytes, None]:
    head, options = _head(service, body.model, "chat.completion.chunk"), body.stream_options
    counted = options is not None and bool(options.include_usage)
    always = options is not None and bool(options.continuous_usage_stats)
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
        yield chunk(number, {"role": "assistant", "content": None if dialogue.must_call else ""})
    async with aclosing(parsed.steps(service, dialogue, requests)) as stepped:
        async for batch in stepped:
            for step in batch:
                number, one = step.number, step.chunk
                last[number] = one
                waiting = body.return_progress and not one.completion_tokens
                fields = _fields(step.delta, body.functions is not None)
                if not fields and (waiting or (one.logprobs and body.logprobs)):
                    fields = [{}]
                for place, delta in enumerate(fields):
                    yield chunk(number, delta, replace(one, logprobs=()) if place else one)
                if step.finish is not None:
                    yield chunk(number, {}, replace(one, logprobs=()), _reason(step.finish, body))
            yield NOTHING
    if counted:
        yield event(head | {"choices": [], "usage": replies.usage(last.values(), len(requests))})
    yield DONE
