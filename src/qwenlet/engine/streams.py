"""A request's chunks, for a thread that waits and for an event loop that must not."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Protocol

from qwenlet.engine.bell import Listener, bell
from qwenlet.engine.records import Chunk
from qwenlet.engine.request import Request
from qwenlet.errors import EngineError

_LOOK_UP_SECONDS = 5.0  # how long a thread waits before it looks whether the engine still lives


class Canceller(Protocol):
    """What a stream needs of the engine."""

    @property
    def alive(self) -> bool: ...

    def cancel(self, request: Request) -> None: ...


class Stream(Iterator[Chunk]):
    """Chunks of one request. Closing the stream, or dropping it half-read, cancels the request.

    A request that failed raises what made it fail after its last chunk.
    """

    def __init__(self, engine: Canceller, request: Request) -> None:
        self._engine, self._request = engine, request
        self._ended = False

    def __next__(self) -> Chunk:
        if self._ended:
            raise _ending(self._request) or StopIteration
        try:
            while True:
                try:
                    chunk = self._request.outbox.get(timeout=_LOOK_UP_SECONDS)
                    break
                except queue.Empty:
                    if not self._engine.alive:
                        raise EngineError("the engine has stopped", hint="load the model again") from None
        except BaseException:  # Ctrl-C while waiting
            self.close()
            raise
        self._ended = chunk.finish_reason is not None
        return chunk

    def close(self) -> None:
        """Ends the request if it hasn't ended; its pages are free within a step."""
        self._ended = True
        self._engine.cancel(self._request)

    def __del__(self) -> None:
        self.close()


class AsyncStream(AsyncIterator[Chunk]):
    """The same for an event loop; to be made where the loop runs. `aclose` or leaving it half-read cancels."""

    def __init__(self, engine: Canceller, request: Request) -> None:
        self._engine, self._request = engine, request
        self._ended = False
        self._ready = asyncio.Event()
        request.listener = Listener(bell(), self._ready.set)

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise _ending(self._request) or StopAsyncIteration
        try:
            while self._request.outbox.empty():
                self._ready.clear()
                if self._request.outbox.empty():  # else a chunk came between the two lines
                    await self._ready.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        chunk = self._request.outbox.get_nowait()
        self._ended = chunk.finish_reason is not None
        return chunk

    def close(self) -> None:
        self._ended = True
        self._engine.cancel(self._request)

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncStreams:
    """Several requests of one caller, read together by the event loop where it was made; `close` cancels them.

    What a slow reader left waiting comes as one chunk of each request.

    Args: patience: seconds of silence after which `next` returns with nothing; None: it waits.
    """

    def __init__(self, engine: Canceller, requests: Sequence[Request], patience: float | None = None) -> None:
        self._engine, self._requests, self._patience = engine, tuple(requests), patience
        self._open = set(range(len(self._requests)))
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        # one timer for all waits: a new one for each would cost more than the wait
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0
        listener = Listener(bell(), self._wake)
        for request in self._requests:
            request.listener = listener

    @property
    def ended(self) -> bool:
        return not self._open

    async def next(self) -> list[tuple[int, Chunk]]:
        """What has come since, as (number of the request, chunk); empty if nothing came for `patience` seconds.

        A request that failed raises what made it fail.
        """
        if came := self._take():
            return came
        self._since = self._loop.time()
        if self._timer is None and self._patience is not None:
            self._timer = self._loop.call_later(self._patience, self._look)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        return self._take()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _look(self) -> None:
        """Ends a wait that has been silent for long enough, or looks again when it will have been."""
        assert self._patience is not None, "else there is no timer"
        self._timer = None
        if self._waiter is None:
            return
        left = self._since + self._patience - self._loop.time()
        if left <= 0.0:
            self._wake()
        else:
            self._timer = self._loop.call_later(left, self._look)

    def _take(self) -> list[tuple[int, Chunk]]:
        came = []
        for number in sorted(self._open) if len(self._open) > 1 else list(self._open):
            request, chunks = self._requests[number], []
            while not request.outbox.empty():
                chunks.append(request.outbox.get_nowait())
            if not chunks:
                continue
            if chunks[-1].finish_reason is not None:
                self._open.discard(number)
                if (failure := _ending(request)) is not None:
                    raise failure
            came.append((number, Chunk.joined(chunks)))
        return came

    def close(self) -> None:
        """Ends what has not ended; its pages are free within a step."""
        self._open.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for request in self._requests:
            self._engine.cancel(request)


def _ending(request: Request) -> Exception | None:
    failure, request.failure = request.failure, None
    return failure
