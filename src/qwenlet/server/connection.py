"""A client's connection, in what uvicorn leaves without end: how large a request's head may be, how long it may take,
and how long a client may leave unread what was sent. No key has been shown before a head is complete."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from qwenlet.config import ServerConfig
from qwenlet.server.errors import ApiError

MAX_HEAD = 65_536  # bytes of the request line and the headers
_MARGIN_SECONDS = 1.0  # the gate ends a request that is not read, and says whose it was, before the connection is cut


class _TooLarge(Exception):
    """Ends the parser's work."""


class Connection(HttpToolsProtocol):
    """uvicorn's, with the limits of `limits`."""

    def __init__(
        self,
        limits: ServerConfig,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.timeout_keep_alive = limits.idle_timeout  # type: ignore[assignment]  # fractions are fine
        self._limits = limits
        self._in_head = False  # of a request, between its first byte and its last header
        self._head = self._partial = 0  # bytes of it: as fields, and as what may be one field that has not ended
        self._expecting: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._left = 0

    @property
    def _running(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_expecting()
        self._cancel_unread()
        super().connection_lost(exc)

    # ------------------------------------------------------------------------------------------- a request's head

    def data_received(self, data: bytes) -> None:
        began_before = self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._partial = self._partial + len(data) if began_before and self._in_head else 0
        if self._partial > MAX_HEAD:
            self._refuse_large()
        elif self._expecting is None and not self._running:
            self._expect_head()  # what came is half a head, or belongs to no request

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head = True, 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._cancel_expecting()
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > MAX_HEAD:
            raise _TooLarge

    def send_400_response(self, msg: str) -> None:
        if self._head > MAX_HEAD:
            self._refuse_large()
        else:
            super().send_400_response(msg)
            self._watch_unread()

    def _refuse_large(self) -> None:
        self._refuse(ApiError(431, f"the request's headers are larger than {MAX_HEAD} bytes", code="headers_too_large"))

    def _expect_head(self) -> None:
        self._cancel_expecting()
        self._expecting = self.loop.call_later(self._limits.idle_timeout, self._look_at_head)

    def _cancel_expecting(self) -> None:
        if self._expecting is not None:
            self._expecting.cancel()
            self._expecting = None

    def _look_at_head(self) -> None:
        self._expecting = None
        if not self._running:  # else the wait begins again when the reply has ended
            self.timeout_keep_alive_handler()

    def timeout_keep_alive_handler(self) -> None:
        if self._in_head and not self.transport.is_closing():
            words = f"the request's headers did not arrive within {self._limits.idle_timeout:g} s"
            self._refuse(ApiError(408, words, code="headers_timeout"))
        else:
            super().timeout_keep_alive_handler()
            self._watch_unread()

    def _refuse(self, error: ApiError) -> None:
        """The last that is written, unless a reply is: nothing may come in its middle."""
        if not self._running:
            body = msgspec.json.encode(error.body)
            fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + body)
        self.transport.close()
        self._watch_unread()

    # ------------------------------------------------------------------------------------- what a client leaves unread

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._cancel_unread()

    # a transport that is closed first sends what it holds, to a client that may never take it

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_unread()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._watch_unread()

    def _watch_unread(self) -> None:
        if self._unread is None and (left := self.transport.get_write_buffer_size()):
            self._left = left
            self._unread = self.loop.call_later(self._limits.write_timeout + _MARGIN_SECONDS, self._look_at_unread)

    def _cancel_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _look_at_unread(self) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size() < self._left:
            self._watch_unread()  # slowly, but it reads
        else:
            self.transport.abort()
