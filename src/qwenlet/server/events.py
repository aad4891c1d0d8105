"""Server-sent events: written as they come, at the speed of their reader, and ended with their client."""

from __future__ import annotations

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

PING = b": the server is at work\n\n"
DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(data: Any) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _encode(data) + b"\n\n"


def _failed(error: ApiError) -> bytes:
    return event(error.body) + DONE


class EventStream(Response):
    """`events` are whole events, already encoded; `held` is given back at the end.

    An error becomes the last event, in the words of `failed`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], held: ExitStack, failed: Callable[[ApiError], bytes] = _failed
    ) -> None:
        super().__init__()
        self._events, self._held, self._failed = events, held, failed
        del self.headers["content-length"]
        # a proxy that gathers would hold the reply back
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held, suppress(ClientDisconnect):
            await while_connected(receive, self._write(scope, send))

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events):
            try:
                async for one in self._events:
                    await send({"type": "http.response.body", "body": one, "more_body": True})
            except ClientDisconnect:
                raise  # nobody is there to be told
            except Exception as problem:  # of any kind: its status has gone out, so the stream itself has to say it
                error = errors.told(problem, scope["state"]["request_id"])
                await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
