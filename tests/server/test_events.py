"""A stream shows that the server lives, whatever keeps it from telling anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qwenlet.config import SamplingParams, ServerConfig
from qwenlet.engine import Request
from qwenlet.engine.bell import tell
from server.scripted import Script, saying

ASK = [{"role": "user", "content": "Go."}]
STREAMS: dict[str, tuple[str, dict[str, Any], bytes]] = {
    "chat": ("/v1/chat/completions", {"messages": ASK}, b": the server"),
    "completions": ("/v1/completions", {"prompt": "Go."}, b": the server"),
    "responses": ("/v1/responses", {"input": "Go.", "store": False}, b": the server"),
    "messages": ("/v1/messages", {"messages": ASK, "max_tokens": 500}, b"event: ping"),
}


class Slow(Script):
    """A second of short steps that hold `says` each, half of them of the prompt, and then the end."""

    def submit(self, ids: Sequence[int], params: SamplingParams, **more: Any) -> list[Request]:
        says, self.says = self.says, ""
        (request,) = super().submit(ids, params, **more)
        self.says = says
        last = request.outbox.get_nowait()

        def run() -> None:
            for number in range(20):
                time.sleep(0.05)
                written = max(number - 10, 0)
                request.outbox.put(replace(last, text=says, finish_reason=None, completion_tokens=written))
                if request.listener is not None:
                    tell([request.listener])
            request.outbox.put(last)
            if request.listener is not None:
                tell([request.listener])

        threading.Thread(target=run).start()
        return [request]


@pytest.mark.parametrize("name", STREAMS)
def test_steps_that_tell_nothing_are_silence(name: str) -> None:
    """Pieces of a long prompt, text that is held back: what counts is when the client was told something."""
    path, body, ping = STREAMS[name]
    with saying("", kind=Slow, config=ServerConfig(ping_interval=0.2)) as one:
        raw = one.server.call("POST", path, body | {"stream": True}).raw
    assert raw.count(ping) >= 2


def test_steps_that_tell_something_are_none() -> None:
    path, body, ping = STREAMS["chat"]
    with saying("x", kind=Slow, config=ServerConfig(ping_interval=0.9)) as one:
        raw = one.server.call("POST", path, body | {"stream": True}).raw
    assert raw.count(b'"content":"x"') == 20
    assert ping not in raw
