"""POST /v1/responses and what belongs to it: the response kept, read, deleted, and continued.

Input items become messages in `items`; replies become output items and events in `output`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request
from msgspec import UNSET, Meta, Struct
from starlette.responses import Response

from qwenlet.config import SamplingParams
from qwenlet.engine.request import Request as EngineRequest
from qwenlet.server import parsed, replies
from qwenlet.server.bodies import json_answer, post
from qwenlet.server.declared import toolbox_of
from qwenlet.server.dialogue import Dialogue, asked, format_of
from qwenlet.server.errors import ApiError, refused
from qwenlet.server.events import NOTHING, EventStream, named_event
from qwenlet.server.fields import (
    Account,
    Anything,
    CacheKey,
    CacheRules,
    Count,
    SchemaNotes,
    Thinking,
    Tier,
    Verbosity,
    ignored,
    only,
    unsupported,
)
from qwenlet.server.items import conversation, items_of, name_unread
from qwenlet.server.output import Output, usage
from qwenlet.server.service import Service
from qwenlet.store import Store, StoredResponse
from qwenlet.tools import Toolbox

Result = TypeVar("Result")
MAX_CHAIN = 1000  # responses that may lead to one
_LOGPROBS = "message.output_text.logprobs"
# what the others tell of, there is none of
Include = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class TextFormat(SchemaNotes, kw_only=True, forbid_unknown_fields=True):
    """text, json_object or json_schema, flat."""

    type: str
    schema: dict[str, Any] | None = None


class TextSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Verbosity = UNSET


class TokensRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The number of tokens of a response's input."""

    input: str | list[dict[str, Any]] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    truncation: Annotated[str | None, only("disabled", "a prompt is never cut in silence")] = None
    reasoning: Thinking = UNSET
    conversation: Annotated[Anything, unsupported("previous_response_id continues a response")] = UNSET


class ResponsesRequest(TokensRequest, kw_only=True, forbid_unknown_fields=True):
    """A response to items."""

    max_output_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100, description="0 is greedy.")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    store: Annotated[bool | None, Meta(description="Left out: it is kept, for 30 days at most.")] = None
    metadata: dict[str, str] | None = None
    include: Annotated[list[Include] | None, Meta(description=f"{_LOGPROBS} is honoured, others are named.")] = None
    background: Annotated[bool | None, only(False, "a response lives as long as its client listens")] = None
    stream_options: Annotated[Anything, ignored("events are as long as their text")] = UNSET
    max_tool_calls: Annotated[Anything, ignored("it counts built-in tools, and there are none")] = UNSET
    user: Account = UNSET
    safety_identifier: Account = UNSET
    service_tier: Tier = UNSET
    prompt_cache_key: CacheKey = UNSET
    prompt_cache_retention: CacheRules = UNSET
    prompt_cache_options: CacheRules = UNSET
    client_metadata: Annotated[Anything, ignored("nothing is known of it")] = UNSET
    context_management: Annotated[Anything, unsupported("a prompt is never cut in silence")] = UNSET
    moderation: Annotated[Anything, unsupported("nothing moderates")] = UNSET
    prompt: Annotated[Anything, unsupported("there are no stored prompts")] = UNSET


def add(app: FastAPI, service: Service) -> None:
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        service.check_model(body.model)
        toolbox, items = await asyncio.to_thread(_given, body, request.state.ignored)
        owner = request.state.client.owner
        if body.store is not False:
            await kept(service, lambda store: None)  # one that can't be kept is refused before it is written
        dialogue = await _dialogue(service, owner, body, items, toolbox)
        params = await asyncio.to_thread(_params, body, dialogue, request.state.ignored)
        with replies.held(service, request.state.client, 1) as held:
            requests = await replies.submit(
                service, request.state.client, [dialogue.ids], params, held, model=body.model
            )
            running = Running(service, owner, body, toolbox, items, params.logprobs is not None)
            if body.stream:
                events = _stream(running, dialogue, requests)
                return EventStream(events, held.pop_all(), service.config.ping_interval, running.failed)
            async with aclosing(parsed.steps(service, dialogue, requests)) as stepped:
                async for batch in stepped:
                    for step in batch:
                        running.take(step)
            await running.keep()
            return json_answer(running.body)

    async def tokens(body: TokensRequest, request: Request) -> Response:
        service.check_model(body.model)
        toolbox, items = await asyncio.to_thread(_given, body, request.state.ignored)
        dialogue = await _dialogue(service, request.state.client.owner, body, items, toolbox)
        return json_answer({"object": "response.input_tokens", "input_tokens": len(dialogue.ids)})

    post(app, "/v1/responses", ResponsesRequest, respond, prompt="input")
    post(app, "/v1/responses/input_tokens", TokensRequest, tokens, prompt="input")

    @app.get("/v1/responses/{id}", response_model=None)
    async def read(id: str, request: Request) -> Response:
        """A response that was kept."""
        without = _without(request)
        return json_answer((await _found(service, request, id)).body, without)

    @app.delete("/v1/responses/{id}", response_model=None)
    async def delete(id: str, request: Request) -> Response:
        """Keeps a response no longer."""
        owner = request.state.client.owner
        if not await kept(service, lambda store: store.delete_response(id, owner=owner)):
            raise _missing(id)
        return json_answer({"id": id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{id}/cancel", response_model=None)
    async def cancel(id: str, request: Request) -> Response:
        """Ends a background response; there are none."""
        await _found(service, request, id)
        raise ApiError(400, f"the response {id} does not run in the background, so it can't be cancelled", param="id")

    @app.get("/v1/responses/{id}/input_items", response_model=None)
    async def input_items(
        id: str,
        request: Request,
        limit: int = 20,
        order: str = "desc",
        after: str | None = None,
    ) -> Response:
        """What a response was asked, page by page."""
        without = _without(request, "limit", "order", "after")
        if not 1 <= limit <= 100 or order not in ("asc", "desc"):
            raise ApiError(400, f"limit is {limit} and order {order!r:.20}, expected 1 to 100, and asc or desc")
        items = list((await _found(service, request, id)).input)
        items = items if order == "asc" else items[::-1]
        if after is not None:
            places = [place for place, item in enumerate(items) if item.get("id") == after]
            if not places:
                raise ApiError(400, f"after is {after!r:.80}, which is none of the items", param="after")
            items = items[places[0] + 1 :]
        page = items[:limit]
        ends = {"first_id": page[0].get("id") if page else None, "last_id": page[-1].get("id") if page else None}
        return json_answer({"object": "list", "data": page, **ends, "has_more": len(items) > limit}, without)


def _given(body: TokensRequest, ignored: list[str]) -> tuple[Toolbox, list[dict[str, Any]]]:
    toolbox = toolbox_of(body.tools, body.tool_choice, body.parallel_tool_calls, ignored=ignored)
    items = items_of(body.input)
    name_unread(items, ignored)
    return toolbox, items


def _without(request: Request, *read: str) -> dict[str, str]:
    """The header that names the parameters of a GET which have no effect.

    Raises ApiError 400 for those that ask for another kind of answer.
    """
    for name in ("stream", "starting_after"):
        if (given := request.query_params.get(name, "")).lower() not in ("", "false"):
            raise refused(name, f"is {given!r:.80}, which is not supported: a response that was kept is told whole")
    names = sorted(name[:40] for name in set(request.query_params) - {"stream", "starting_after", *read})
    named = ", ".join([name for name in names if name.isascii() and name.isprintable()][:20])
    return {"x-qwenlet-ignored": named} if named else {}


async def kept(service: Service, work: Callable[[Store], Result]) -> Result:
    """What `work` gives, off the event loop."""
    return await asyncio.to_thread(lambda: work(service.store))


def _missing(id: str) -> ApiError:
    return ApiError(404, f"there is no response {id!r:.80}", "not_found_error", param="id", code="response_not_found")


async def _found(service: Service, request: Request, id: str) -> StoredResponse:
    """One that the caller's key made; others are not there for it."""
    owner = request.state.client.owner
    found = await kept(service, lambda store: store.response(id, owner=owner))
    if found is None:
        raise _missing(id)
    return found


async def _dialogue(
    service: Service, owner: str, body: TokensRequest, items: list[dict[str, Any]], toolbox: Toolbox
) -> Dialogue:
    earlier: list[Any] = []
    if body.previous_response_id is not None:
        earlier = await kept(service, lambda store: _chain(store, owner, body.previous_response_id))

    def built() -> Dialogue:
        told = conversation(earlier, "previous_response_id") + conversation(items, "input")
        return asked(service.llm, told, toolbox, instructions=body.instructions)

    return await asyncio.to_thread(built)


def _chain(store: Store, owner: str, id: str | None) -> list[Any]:
    """Input and output items of the responses that led here, the oldest first; without their instructions."""
    turns: list[list[Any]] = []
    while id is not None:
        found = store.response(id, owner=owner)
        if found is None or len(turns) >= MAX_CHAIN:
            why = "is not kept here" if found is None else f"has more than {MAX_CHAIN} before it"
            code = "previous_response_not_found"
            raise ApiError(400, f"the response {id!r:.80} {why}", param="previous_response_id", code=code)
        turns.append([*found.input, *found.body["output"]])
        id = found.previous
    return [item for turn in reversed(turns) for item in turn]


def _params(body: ResponsesRequest, dialogue: Dialogue, ignored: list[str]) -> SamplingParams:
    wanted = body.text.format if body.text is not None else None
    answer = None if wanted is None else format_of(wanted.type, wanted.schema, "text.format")
    held = dialogue.held_to(answer, "text.format", ignored, "tools[].strict")
    ignored += [f"include[{one}]" for one in dict.fromkeys(body.include or ()) if one != _LOGPROBS]
    asked_for = body.top_logprobs is not None or _LOGPROBS in (body.include or ())
    return SamplingParams(
        max_new_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=(body.top_logprobs or 0) if asked_for else None,
        stop=dialogue.stop,
        **held,
    )


class Running:
    """One response while it is made.

    Attributes:
        body: its object, as it stands.
    """

    def __init__(
        self,
        service: Service,
        owner: str,
        body: ResponsesRequest,
        toolbox: Toolbox,
        items: list[dict[str, Any]],
        logprobs: bool,
    ) -> None:
        self.service, self._owner, self._items, self._store = service, owner, items, body.store is not False
        self._previous = body.previous_response_id
        self._output = Output(service.llm.tokenizer, logprobs)
        self._number = 0
        self.body = _object(service, body, toolbox)

    def event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event(kind, {"type": kind, "sequence_number": number, **fields})

    def take(self, step: parsed.Step) -> list[bytes]:
        """The events of one step, which is taken into `body`."""
        events = self._output.take(step)
        self.body["output"] = self._output.items
        if step.finish is not None:
            cut = step.finish == "length"
            self.body["status"] = "incomplete" if cut else "completed"
            self.body["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
            self.body["completed_at"] = None if cut else int(time.time())
            self.body["usage"] = usage(step.chunk)
        return [self.event(kind, **fields) for kind, fields in events]

    async def keep(self) -> None:
        if self._store:
            id, body, items, previous = self.body["id"], self.body, tuple(self._items), self._previous
            await kept(self.service, lambda store: store.save_response(id, body, items, previous, owner=self._owner))

    def failed(self, error: ApiError) -> bytes:
        """The last events of a response that could not be made."""
        told = {"code": error.code or error.kind, "message": error.message}
        self.body |= {"status": "failed", "error": told}
        return self.event("error", **told, param=error.param) + self.event("response.failed", response=self.body)


async def _stream(running: Running, dialogue: Dialogue, requests: list[EngineRequest]) -> AsyncGenerator[bytes, None]:
    yield running.event("response.created", response=running.body)
    yield running.event("response.in_progress", response=running.body)
    async with aclosing(parsed.steps(running.service, dialogue, requests)) as stepped:
        async for batch in stepped:
            for step in batch:
                for one in running.take(step):
                    yield one
            yield NOTHING
    await running.keep()
    yield running.event(f"response.{running.body['status']}", response=running.body)


def _object(service: Service, body: ResponsesRequest, toolbox: Toolbox) -> dict[str, Any]:
    """A response before its first token: what was asked, told back."""
    wanted = body.text.format if body.text is not None else None
    told: dict[str, Any] = {"type": "text" if wanted is None else wanted.type}
    if wanted is not None and wanted.type == "json_schema":
        told |= {"name": wanted.name or "schema", "schema": wanted.schema, "strict": True}
    tools = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": dict(tool.parameters),
            "strict": tool.strict,
        }
        for tool in toolbox.tools
    ]
    defaults = service.llm.defaults
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": service.called(body.model),
        "output": [],
        "parallel_tool_calls": bool(body.parallel_tool_calls),
        "previous_response_id": body.previous_response_id,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": told},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "safety_identifier": None,
        "prompt_cache_key": None,
        "metadata": body.metadata or {},
    }
