"""Server-sent events: written as they come, at the speed of their reader, and ended with their client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing, suppress
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwenlet.server import errors
from qwenlet.server.bodies import while_connected
from qwenlet.server.errors import ApiError

NOTHING = b""  # a stream yields it where something came that is not told, or nothing came for a while
DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(data: Any) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _encode(data) + b"\n\n"


def _failed(error: ApiError) -> bytes:
    return event(error.body) + DONE


class EventStream(Response):
    """`events` are whole events, already encoded, or NOTHING; `held` is given back at the end.

    An error becomes the last event, in the words of `failed`. Where nothing was told for `silence` seconds, `ping` is.
    """

    media_type = "text/event-stream"
    ping = b": the server is at work\n\n"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        held: ExitStack,
        silence: float,
        failed: Callable[[ApiError], bytes] = _failed,
    ) -> None:
        super().__init__()
        self._events, self._held, self._silence, self._failed = events, held, silence, failed
        del self.headers["content-length"]
        # a proxy that gathers would hold the reply back
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held, suppress(ClientDisconnect):
            await while_connected(receive, self._write(scope, send))

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        now = asyncio.get_running_loop().time
        told = now()
        async with aclosing(self._events):
            try:
                async for one in self._events:
                    if one or (self.ping and now() - told >= self._silence):
                        await send({"type": "http.response.body", "body": one or self.ping, "more_body": True})
                        told = now()
            except ClientDisconnect:
                raise  # nobody is there to be told
            except Exception as problem:  # of any kind: its status has gone out, so the stream itself has to say it
                error = errors.told(problem, scope["state"]["request_id"])
                await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
