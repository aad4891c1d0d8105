"""How long a client may take to read what was sent, at little cost for each write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from starlette.requests import ClientDisconnect


class Patience:
    """Watches the writes of one answer, which follow each other.

    One timer serves them all: one for each would cost more than the write, of which a stream has one for every token.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._loop = seconds, asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._since: float | None = None
        self._writer: asyncio.Task[None] | None = None
        self.lost = False

    async def write(self, sending: Awaitable[None]) -> None:
        """Raises ClientDisconnect where the client does not read in time; `lost` is then true."""
        self._since, self._writer = self._loop.time(), asyncio.current_task()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._look)
        try:
            await sending
        except asyncio.CancelledError:
            if not self.lost or self._writer is None or self._writer.uncancel():
                raise  # somebody else ends it, too
            raise ClientDisconnect from None
        finally:
            self._since = self._writer = None

    def _look(self) -> None:
        self._timer = None
        if self._since is None or self._writer is None:
            return
        left = self._since + self._seconds - self._loop.time()
        if left > 0.0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self.lost = True
            self._writer.cancel()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
