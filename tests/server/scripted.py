"""A server on loopback whose model says what a test wrote down, so that free choices can be tested, too."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import uvicorn

from engine.tiny import byte_tokenizer
from qwenlet.config import EngineConfig, GenerationDefaults, SamplingParams, ServerConfig, qwen_1_8b
from qwenlet.engine import AsyncStreams, Chunk, Request, Timings
from qwenlet.engine.stop import StopTexts, StopTokens
from qwenlet.server.app import build
from qwenlet.server.service import Service
from server.conftest import Server

Says = str | Callable[[SamplingParams], str]


class Script:
    """In place of an engine: every request is answered with `says`, cut anywhere; its stop texts end it.

    Args:
        says: may depend on what is asked for.
    Attributes:
        asked: parameters of the requests that came.
    """

    alive = True

    def __init__(self, says: Says, seed: int) -> None:
        self.says, self.asked = says, []  # type: ignore[var-annotated]
        self._draw = random.Random(seed)

    def submit(self, ids: Sequence[int], params: SamplingParams, **more: Any) -> list[Request]:
        self.asked.append(params)
        return [self._request(tuple(ids), params, choice) for choice in range(params.n)]

    def _request(self, ids: tuple[int, ...], params: SamplingParams, choice: int) -> Request:
        settled = replace(params, max_new_tokens=500, seed=0)
        stops = StopTexts(tuple(params.stop or ()))
        request = Request(ids, settled, 1.0, StopTokens(()), stops, choice=choice)
        rest, stopped, number = self.says if isinstance(self.says, str) else self.says(params), False, 0
        while rest and not stopped:
            cut = self._draw.randint(1, 9)
            text, stopped = stops.push(rest[:cut])
            rest, number = rest[cut:], number + 1
            request.outbox.put(self._chunk(request, text, number, None))
        request.finish_reason = "stop"
        request.outbox.put(self._chunk(request, "" if stopped else stops.flush(), number + 1, "stop"))
        return request

    @staticmethod
    def _chunk(request: Request, text: str, number: int, reason: Any) -> Chunk:
        length = len(request.prompt)
        return Chunk(text, (65,), reason, length, length, number, 0, Timings(), choice=request.choice)

    def astreams(self, requests: Sequence[Request], patience: float | None = None) -> AsyncStreams:
        return AsyncStreams(self, requests, patience)

    def cancel(self, request: Request) -> None:
        pass

    stop = cancel


@dataclass(frozen=True)
class Scripted:
    server: Server
    script: Script


@contextmanager
def saying(
    text: Says, seed: int = 0, kind: type[Script] = Script, config: ServerConfig | None = None
) -> Iterator[Scripted]:
    """The real application and HTTP around a script."""
    script = kind(text, seed)
    service = Service("demo", config or ServerConfig())
    llm: Any = SimpleNamespace(
        tokenizer=byte_tokenizer(), engine=script, options=EngineConfig(), defaults=GenerationDefaults(),
        default_system="", context_length=8192, adapters=(), config=qwen_1_8b(),
    )  # fmt: skip
    service.open(llm)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    running = uvicorn.Server(uvicorn.Config(build(service), log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[listening])))
    thread.start()
    try:
        yield Scripted(Server(None, listening.getsockname()[1]), script)  # type: ignore[arg-type]
    finally:
        running.should_exit = True
        thread.join(30)
        listening.close()
