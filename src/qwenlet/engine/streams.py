"""A request's chunks, for a thread that waits and for an event loop that must not."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

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
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop was closed before its stream
                loop.call_soon_threadsafe(self._ready.set)

        request.on_chunk = tell

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
    """

    def __init__(self, engine: Canceller, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, tuple(requests)
        self._open = set(range(len(self._requests)))
        self._ready = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop was closed before its streams
                loop.call_soon_threadsafe(self._ready.set)

        for request in self._requests:
            request.on_chunk = tell

    @property
    def ended(self) -> bool:
        return not self._open

    async def next(self, seconds: float | None = None) -> list[tuple[int, Chunk]]:
        """What has come since, as (number of the request, chunk); empty if nothing came within `seconds`.

        A request that failed raises what made it fail.
        """
        self._ready.clear()
        if not (came := self._take()):
            try:
                async with asyncio.timeout(seconds):
                    await self._ready.wait()
            except TimeoutError:
                return []
            came = self._take()
        return came

    def _take(self) -> list[tuple[int, Chunk]]:
        came = []
        for number in sorted(self._open):
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
        for request in self._requests:
            self._engine.cancel(request)


def _ending(request: Request) -> Exception | None:
    failure, request.failure = request.failure, None
    return failure
