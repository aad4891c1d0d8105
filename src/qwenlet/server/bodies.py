"""A body becomes a request, and a handler works on it for as long as its client is there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np
from fastapi import FastAPI, Request
from msgspec import Struct
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from qwenlet.errors import ContextLengthError
from qwenlet.server.errors import ApiError, explained
from qwenlet.server.fields import check_effects

Body = TypeVar("Body")
Asked = TypeVar("Asked", bound=Struct)
Result = TypeVar("Result")
MAX_DEPTH = 200  # less than what the store takes, which keeps parts of bodies
MAX_NESTED = 100_000  # lists and objects: more take seconds to build, in which no thread runs
LARGE = 65_536  # bytes of a body that is read beside the event loop
_ANYTHING = msgspec.json.Decoder()
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_PLACE = re.compile(r" - at `\$\.?(.*?)`$")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")


def decoded(raw: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Raises ApiError 400 that names the place, for what is no JSON, nested too much, or not of the decoder's type."""
    try:
        # most bodies are known to be shallow without a look at their order
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
            nested, levels = nesting(raw)
            if nested > MAX_NESTED:
                raise ApiError(400, f"the body holds {nested} lists and objects, and {MAX_NESTED} are read")
            if levels > MAX_DEPTH:
                raise ApiError(400, f"the body is nested {levels} levels deep, and {MAX_DEPTH} are read")
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        words = str(problem)
        place = _PLACE.search(words)
        param = place.group(1) if place else None
        if unknown := _UNKNOWN.search(words):
            param = f"{param}.{unknown.group(1)}" if param else unknown.group(1)
        valid = isinstance(problem, msgspec.ValidationError)
        raise ApiError(400, words if valid else f"the body is not JSON: {words}", param=param) from None


def nesting(raw: bytes) -> tuple[int, int]:
    """How many lists and objects a JSON text holds, and how many of them lie within each other.

    Nothing is built of it, as it may be hostile. Where it is not JSON, this holds up to the first error.
    """
    codes = np.frombuffer(raw.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    steps = _STEPS[codes]
    steps[np.logical_xor.accumulate(codes == ord('"'))] = 0  # brackets within strings
    return int(np.count_nonzero(steps > 0)), int(steps.cumsum(dtype=np.int32).max(initial=0))


async def of_body(request: Request, work: Callable[[bytes], Result]) -> Result:
    """What `work` makes of the request's body; of a large one in a thread, for the event loop serves all."""
    raw = await request.body()
    return work(raw) if len(raw) < LARGE else await asyncio.to_thread(work, raw)


def json_answer(answer: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(answer), headers=headers, media_type="application/json")


def post(
    app: FastAPI,
    path: str,
    kind: type[Asked],
    handler: Callable[[Asked, Request], Awaitable[Response]],
    *,
    prompt: str | None = None,
) -> None:
    """Routes POST `path` to `handler`; fields of the body that have no effect are named in `x-qwenlet-ignored`.

    A handler adds to `request.state.ignored` what it finds to have none.
    `prompt` is the field to blame for a prompt that does not fit the context.
    """
    decoder = msgspec.json.Decoder(kind)

    def read(raw: bytes) -> tuple[Asked, list[str]]:
        body = decoded(raw, decoder)
        without = check_effects(body)
        if not kind.__struct_config__.forbid_unknown_fields:
            without += _unknown(decoded(raw, _ANYTHING), kind, body)
        return body, without

    async def endpoint(request: Request) -> Response:
        body, without = await of_body(request, read)
        request.state.ignored = without
        try:
            response = await while_connected(request.receive, handler(body, request))
        except ContextLengthError as problem:
            error = explained(problem)
            assert error is not None, "this error has a reason for clients"
            error.param = prompt
            raise error from None
        if without:
            response.headers["x-qwenlet-ignored"] = ", ".join(dict.fromkeys(without))
        return response

    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        name=path,
        summary=(kind.__doc__ or "").partition("\n")[0],
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
        response_model=None,
    )


def _unknown(given: Any, kind: type[Struct], body: Struct, place: str = "") -> list[str]:
    """Fields that a request which may hold any does not know; as many as a header can carry."""
    if kind.__struct_config__.forbid_unknown_fields:
        return []
    names = sorted(given.keys() - set(kind.__struct_encode_fields__))
    found = [place + name[:40] for name in names if name.isascii() and name.isprintable()]
    for name in kind.__struct_fields__:
        if isinstance(nested := getattr(body, name), Struct):
            found += _unknown(given[name], type(nested), nested, f"{place}{name}.")
    return found[:20]


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` gives; it is cancelled, and ClientDisconnect raised, when the client goes away."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
