"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients speak."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import FastAPI, Request
from msgspec import UNSET, Meta, Struct
from starlette.responses import Response

from qwenlet.config import SamplingParams
from qwenlet.engine import Chunk
from qwenlet.engine.request import Request as EngineRequest
from qwenlet.server import parsed, replies
from qwenlet.server.bodies import json_answer, post
from qwenlet.server.declared import toolbox_of
from qwenlet.server.dialogue import Delta, Dialogue, asked
from qwenlet.server.errors import ApiError, anthropic, refused
from qwenlet.server.events import NOTHING, EventStream, named_event
from qwenlet.server.fields import Anything, Count, Stops, Thinking, Tier, ignored
from qwenlet.server.nested import Fields, look
from qwenlet.server.parsed import arguments_object
from qwenlet.server.service import Service
from qwenlet.tools import Call, ToolMessage

# what is read of an object of each kind; other fields have no effect, and are named
_KNOWN = {
    "message": Fields.of("role content"),
    "text": Fields.of("type text"),
    "thinking": Fields.of("type thinking signature"),
    "redacted_thinking": Fields.of("type data"),
    "tool_use": Fields.of("type id name input"),
    "tool_result": Fields.of("type tool_use_id content is_error"),
    "tool": Fields.of("type name description input_schema"),
    "tool_choice": Fields.of("type name disable_parallel_tool_use"),
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class CountRequest(Struct, kw_only=True):
    """The number of tokens of a message's prompt."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking = UNSET


class MessagesRequest(CountRequest, kw_only=True):
    """The assistant's next message, in Anthropic's form."""

    max_tokens: Count
    temperature: Annotated[float, Meta(ge=0, le=1, description="0 is greedy.")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
    metadata: Annotated[Anything, ignored("nothing is kept here")] = UNSET
    service_tier: Tier = UNSET


class MessageStream(EventStream):
    ping = named_event("ping", {"type": "ping"})


def add(app: FastAPI, service: Service) -> None:
    async def write(body: MessagesRequest, request: Request) -> Response:
        service.check_model(body.model)
        dialogue, params = await asyncio.to_thread(_asked, service, body, request.state.ignored)
        with replies.held(service, request.state.client, 1) as held:
            requests = await replies.submit(
                service, request.state.client, [dialogue.ids], params, held, model=body.model
            )
            writing = Writing(service, body)
            if body.stream:
                events = _stream(service, writing, dialogue, requests)
                return MessageStream(events, held.pop_all(), service.config.ping_interval, _failed)
            async with aclosing(parsed.steps(service, dialogue, requests)) as stepped:
                async for batch in stepped:
                    for step in batch:
                        writing.take(step)
            return json_answer(writing.message())

    async def count(body: CountRequest, request: Request) -> Response:
        service.check_model(body.model)
        dialogue = await asyncio.to_thread(_dialogue, service, body, request.state.ignored)
        return json_answer({"input_tokens": len(dialogue.ids)})

    post(app, "/v1/messages", MessagesRequest, write, prompt="messages")
    post(app, "/v1/messages/count_tokens", CountRequest, count, prompt="messages")


# ---------------------------------------------------------------------------------------------------- what is asked


def _asked(service: Service, body: MessagesRequest, ignored: list[str]) -> tuple[Dialogue, SamplingParams]:
    dialogue = _dialogue(service, body, ignored)
    return dialogue, _params(body, dialogue)


def _dialogue(service: Service, body: CountRequest, ignored: list[str]) -> Dialogue:
    if not body.messages:
        raise ApiError(400, "messages is empty, expected one or more", param="messages")
    told = [one for place, each in enumerate(body.messages) for one in _told(each, f"messages[{place}]", ignored)]
    system = None if body.system is None else _texts(body.system, "system", ignored)
    look(body.tools, _KNOWN["tool"], "tools", ignored)
    look(body.tool_choice or {}, _KNOWN["tool_choice"], "tool_choice", ignored)
    choice, parallel = _choice(body.tool_choice)
    toolbox = toolbox_of([_tool(tool) for tool in body.tools or ()], choice, parallel, ignored=ignored)
    final = told[-1].role == "assistant" and not told[-1].calls  # a beginning that the reply goes on from
    return asked(service.llm, told, toolbox, instructions=system, continue_final=final)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if (kind := tool.get("type") or "custom") != "custom":
        raise refused("tools", f"holds one of type {kind!r:.80}; only tools with an input_schema are known here")
    declared = {"name": tool.get("name"), "description": tool.get("description")}
    return declared | {"parameters": tool.get("input_schema"), "type": "function"}


def _choice(choice: Mapping[str, Any] | None) -> tuple[Any, bool | None]:
    if choice is None:
        return None, None
    parallel = False if choice.get("disable_parallel_tool_use") is True else None
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "name": choice.get("name")}, parallel
    if not isinstance(kind, str) or kind not in _CHOICES:
        words = f"tool_choice has the type {kind!r:.80}, expected auto, any, tool or none"
        raise ApiError(400, words, param="tool_choice")
    return _CHOICES[kind], parallel


def _told(message: Mapping[str, Any], place: str, ignored: list[str]) -> list[ToolMessage]:
    """Results come first, each a message of its own."""
    role, content = message.get("role"), message.get("content")
    look(message, _KNOWN["message"], "messages[]", ignored)
    if role not in ("user", "assistant", "system"):
        raise ApiError(400, f"{place}.role is {role!r:.80}, expected user or assistant", param=f"{place}.role")
    if isinstance(content, str):
        return [ToolMessage(role, content)]
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{place}.content is missing, expected text or blocks", param=f"{place}.content")
    text, thought = "", ""
    calls: list[Call] = []
    results: list[ToolMessage] = []
    for number, block in enumerate(content):
        here = f"{place}.content[{number}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if isinstance(kind, str) and kind in _KNOWN:
            look(block, _KNOWN[kind], "messages[].content[]", ignored)
        if kind == "text":
            text += _string(block, "text", here)
        elif kind == "thinking" and role == "assistant":
            thought += _string(block, "thinking", here)
        elif kind == "tool_use" and role == "assistant":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            calls.append(Call(_string(block, "id", here), _string(block, "name", here), arguments))
        elif kind == "tool_result" and role == "user":
            told = _texts(block.get("content") or "", f"{here}.content", ignored)
            told = f"Error: {told}" if block.get("is_error") is True else told
            results.append(ToolMessage("tool", told, call_id=_string(block, "tool_use_id", here)))
        elif not (kind == "redacted_thinking" and role == "assistant"):
            raise refused(f"{here}.type", f"is {kind!r:.80}, which a {role} message can't hold here")
    if results and not text:
        return results
    return [*results, ToolMessage(role, text, tuple(calls), thought)]


def _texts(content: Any, place: str, ignored: list[str]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{place} is {content!r:.80}, expected text or blocks", param=place)
    for number, block in enumerate(content):
        if not isinstance(block, Mapping) or block.get("type") != "text":
            raise refused(f"{place}[{number}].type", "is not text, and the model reads text alone")
        look(block, _KNOWN["text"], f"{place}[]", ignored)
    return "\n".join(_string(block, "text", f"{place}[{number}]") for number, block in enumerate(content))


def _string(block: Mapping[str, Any], name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{place}.{name} is {value!r:.80}, expected text", param=f"{place}.{name}")
    return value


def _params(body: MessagesRequest, dialogue: Dialogue) -> SamplingParams:
    if "" in (body.stop_sequences or ()):
        raise ApiError(400, "stop_sequences holds an empty text, which would end every reply", param="stop_sequences")
    fields: dict[str, Any] = {"stop": (*(body.stop_sequences or ()), *dialogue.stop)}
    fields |= dialogue.held_to(None, "", [])  # this protocol has no formats
    return SamplingParams(
        max_new_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, **fields
    )


# ---------------------------------------------------------------------------------------------------- answers


class Writing:
    """One message while it is written, block by block."""

    def __init__(self, service: Service, body: MessagesRequest) -> None:
        self._tokenizer, self._model = service.llm.tokenizer, service.called(body.model)
        self._stops = tuple(body.stop_sequences or ())
        self._id = f"msg_{secrets.token_hex(12)}"
        self._blocks: list[dict[str, Any]] = []
        self._open: str | None = None
        self._ids: list[int] = []
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._usage = {"input_tokens": 0, "output_tokens": 0}

    def begin(self, prompt_tokens: int) -> bytes:
        self._usage["input_tokens"] = prompt_tokens
        return _event("message_start", message=self.message())

    def take(self, step: parsed.Step) -> list[bytes]:
        """The events of one step."""
        self._ids += step.chunk.token_ids
        events = self._add(step.delta)
        if step.finish is not None:
            events += self._close()
            stop = self._stop_sequence() if step.finish == "stop" else None
            reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
            reason = "stop_sequence" if stop is not None else reasons.get(step.finish, "end_turn")
            self._end = {"stop_reason": reason, "stop_sequence": stop}
            self._usage = _usage(step.chunk)
            events += [_event("message_delta", delta=self._end, usage=self._usage), _event("message_stop")]
        return events

    def message(self) -> dict[str, Any]:
        blocks = [
            {k: v for k, v in block.items() if k != "written"} | ({"input": arguments_object(block["written"])})
            if block["type"] == "tool_use"
            else dict(block)
            for block in self._blocks
        ]
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return head | {"content": blocks, **self._end, "usage": dict(self._usage)}

    def _stop_sequence(self) -> str | None:
        """The client's text that ended the reply. No other place of the reply can hold one."""
        whole = self._tokenizer.decode(self._ids)
        found = [(whole.find(stop), stop) for stop in self._stops if stop in whole]
        return min(found)[1] if found else None

    def _add(self, delta: Delta) -> list[bytes]:
        events: list[bytes] = []
        if delta.thought:
            events += self._write("thinking", "thinking", "thinking_delta", delta.thought)
        if delta.text:
            events += self._write("text", "text", "text_delta", delta.text)
        for call in delta.calls:
            if call.name is not None:
                events += self._close()
                block = {"type": "tool_use", "id": call.id, "name": call.name}
                self._blocks.append(block | {"written": ""})
                self._open = "tool_use"
                events.append(
                    _event("content_block_start", index=len(self._blocks) - 1, content_block=block | {"input": {}})
                )
            if call.arguments:
                self._blocks[-1]["written"] += call.arguments
                events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return events

    def _write(self, kind: str, field: str, delta: str, text: str) -> list[bytes]:
        events: list[bytes] = []
        if self._open != kind:
            events += self._close()
            block = {"type": kind, field: ""} | ({"signature": ""} if kind == "thinking" else {})
            self._blocks.append(block)
            self._open = kind
            events.append(_event("content_block_start", index=len(self._blocks) - 1, content_block=block))
        self._blocks[-1][field] += text
        return [*events, self._delta({"type": delta, field: text})]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [_event("content_block_stop", index=len(self._blocks) - 1)]


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, {"type": kind, **fields})


def _failed(error: ApiError) -> bytes:
    return named_event("error", anthropic(error))


def _usage(chunk: Chunk) -> dict[str, int]:
    """Anthropic counts what was read from the cache apart."""
    return {
        "input_tokens": chunk.prompt_tokens - chunk.cached_tokens,
        "output_tokens": chunk.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": chunk.cached_tokens,
    }


async def _stream(
    service: Service, writing: Writing, dialogue: Dialogue, requests: Sequence[EngineRequest]
) -> AsyncGenerator[bytes, None]:
    yield writing.begin(len(dialogue.ids))
    async with aclosing(parsed.steps(service, dialogue, requests)) as stepped:
        async for batch in stepped:
            for step in batch:
                for one in writing.take(step):
                    yield one
            yield NOTHING
