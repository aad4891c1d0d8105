"""Clients that ask for too much, too slowly, or from elsewhere: each is told, and none hurts the others."""

from __future__ import annotations

import asyncio
import json
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from qwenlet.config import EngineConfig, ServerConfig
from qwenlet.server.errors import ApiError
from qwenlet.server.gate import Gate
from qwenlet.server.service import Client, Service
from server.conftest import Server, running

LONG = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(demo_gguf: Path) -> Iterator[Server]:
    """One seat, no queue, little patience."""
    options = "--quiet --max-requests 1 --max-queue 0 --request-timeout 2 --body-timeout 1 --ping-interval 0.02"
    more = "--cors-origin https://chat.example --allowed-host box.example"
    with running(demo_gguf, *options.split(), *more.split()) as one:
        yield one


def test_a_full_queue_says_when_to_come_back(narrow: Server) -> None:
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(narrow.call("POST", "/v1/completions", LONG)))
    asking.start()
    deadline = time.monotonic() + 2
    seated = b'vllm:num_requests_running{engine="0",model_name="demo"} 1'
    while seated not in narrow.call("GET", "/metrics").raw:
        assert time.monotonic() < deadline
    turned = narrow.call("POST", "/v1/completions", LONG)
    asking.join()
    assert turned.status == 503
    assert turned.error["code"] == "overloaded"
    assert int(turned.headers["retry-after"]) >= 1
    # the first did not end within its two seconds
    assert answers[0].status == 504
    assert answers[0].error["code"] == "timeout"


def test_a_streams_deadline_is_its_last_event(narrow: Server) -> None:
    events = narrow.call("POST", "/v1/completions", LONG | {"stream": True}).events
    assert "error" not in events[0]
    assert events[-1]["error"]["code"] == "timeout"


def test_a_long_prompt_is_not_silence(narrow: Server) -> None:
    body = {"prompt": [7, 8, 9, 10] * 300, "max_tokens": 1, "stream": True}
    raw = narrow.call("POST", "/v1/completions", body).raw
    assert raw.startswith(b": ")
    assert b"\n\n: " in raw
    assert raw.endswith(b"data: [DONE]\n\n")


def half(server: Server, *, stay: bool) -> bytes:
    """What comes back for a body that ends in its middle."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n"
        connection.sendall(head.encode() + b'{"prompt": "a')
        if not stay:
            connection.shutdown(socket.SHUT_WR)
        return connection.recv(65536)


def test_bodies_cut_in_the_middle(narrow: Server) -> None:
    assert half(narrow, stay=True).startswith(b"HTTP/1.1 408")
    half(narrow, stay=False)
    assert narrow.call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}).status == 200


def memory_mb(server: Server) -> float:
    told = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(told.partition("VmRSS:")[2].split()[0]) / 1024


def test_a_huge_body_is_refused_before_it_is_sent(server: Server) -> None:
    """Its length says enough: nothing of it is waited for."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000000\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_huge_body_of_unknown_length_is_refused_on_its_way(server: Server) -> None:
    """100 MB in pieces, as a client that asks no leave: the server stops reading soon after its limit of 8 MB."""
    before, sent = memory_mb(server), 0
    piece = b"%x\r\n%s\r\n" % (100_000, b" " * 100_000)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        answer = b""
        while sent < 100_000_000 and not answer:
            if select.select([connection], [], [], 0)[0]:
                answer = connection.recv(65536)
            elif select.select([], [connection], [], 0.1)[1]:
                connection.sendall(piece)
                sent += 100_000
        assert answer.startswith(b"HTTP/1.1 413")
    assert sent < 50_000_000  # what lies in buffers of the system is among it
    assert memory_mb(server) - before < 40.0
    assert server.chat(max_tokens=1).status == 200


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
def test_a_thousand_idle_connections_cost_little(demo_gguf: Path) -> None:
    """More than a shell's usual limit of files allows: the server raises its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip("this system allows too few files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with ExitStack() as held:
            server = held.enter_context(running(demo_gguf, "--quiet"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (3000, hard))
            assert server.chat(max_tokens=1).status == 200
            before = memory_mb(server)
            for _ in range(1000):
                connection = server.connect()
                held.callback(connection.close)
                connection.request("GET", "/version")
                assert connection.getresponse().read()
            assert memory_mb(server) - before < 50.0
            assert server.chat(max_tokens=1).status == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_names_of_the_server(narrow: Server) -> None:
    for good in ("localhost", f"127.0.0.1:{narrow.port}", "[::1]:80", "box.example"):
        assert narrow.call("GET", "/v1/models", host=good).status == 200, good
    for bad in ("evil.example", "127.0.0.1.evil.example", "[", ""):
        answer = narrow.call("GET", "/v1/models", host=bad)
        assert answer.status == 403, bad
        assert answer.error["code"] == "host_not_allowed"


def test_pages_of_a_named_origin_may_ask(narrow: Server, server: Server) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    good = narrow.call("OPTIONS", "/v1/chat/completions", origin="https://chat.example", **asks)
    assert good.status == 200
    assert good.headers["access-control-allow-origin"] == "https://chat.example"
    bad = narrow.call("OPTIONS", "/v1/chat/completions", origin="https://evil.example", **asks)
    assert bad.status == 400
    off = server.call("GET", "/v1/models", origin="https://chat.example")
    assert "access-control-allow-origin" not in off.headers


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_other_sites_can_make_nobody_work(narrow: Server, server: Server, headers: dict[str, str]) -> None:
    """A page's script needs nobody's leave to send plain text anywhere: what it can't read would run all the same."""
    body = {"prompt": "a", "max_tokens": 1}
    sent = {"content-type": "text/plain"} | headers
    for one in (server, narrow):
        answer = one.call("POST", "/v1/completions", body, **sent)
        assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    assert server.call("DELETE", "/v1/responses/resp_1", **headers).status == 403
    told = server.call("POST", "/v1/messages", {}, **sent).json["error"]
    assert told["type"] == "permission_error"
    assert isinstance(server.call("POST", "/api/generate", {}, **sent).json["error"], str)
    assert server.call("GET", "/v1/models", **headers).status == 200


def test_own_pages_named_ones_and_programs_work(narrow: Server, server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    here = {"origin": f"http://127.0.0.1:{server.port}"}
    for headers in ({}, here, here | {"sec-fetch-site": "same-origin"}, {"content-type": "text/plain"}):
        assert server.call("POST", "/v1/completions", body, **headers).status == 200
    named = {"origin": "https://chat.example", "sec-fetch-site": "cross-site"}
    assert narrow.call("POST", "/v1/completions", body, **named).status == 200


def test_rates_are_counted_by_key(demo_gguf: Path) -> None:
    options = "--quiet --api-key sk-one --api-key sk-two --max-per-minute 3"
    with running(demo_gguf, *options.split()) as one:
        body = {"prompt": "a", "max_tokens": 1}
        answers = [one.call("POST", "/v1/completions", body, authorization="Bearer sk-one") for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
        assert answers[0].headers["x-ratelimit-reset-requests"].endswith("s")
        assert answers[3].error["type"] == "rate_limit_error"
        assert 1 <= int(answers[3].headers["retry-after"]) <= 20
        assert one.call("POST", "/v1/completions", body, authorization="Bearer sk-two").status == 200


def test_tokens_are_counted_by_key(demo_gguf: Path) -> None:
    options = "--quiet --api-key sk-one --api-key sk-two --max-tokens-per-minute 60"
    with running(demo_gguf, *options.split()) as one:
        body = {"prompt": [7] * 40, "max_tokens": 30, "ignore_eos": True}
        first = one.call("POST", "/v1/completions", body, authorization="Bearer sk-one")
        assert (first.status, first.headers["x-ratelimit-limit-tokens"]) == (200, "60")
        assert first.headers["x-ratelimit-remaining-tokens"] == "0"  # 70 were used: some are owed
        turned = one.call("POST", "/v1/completions", body, authorization="Bearer sk-one")
        assert (turned.status, turned.error["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(turned.headers["retry-after"]) <= 12
        other = one.call("POST", "/v1/embeddings", {"input": [7] * 20}, authorization="Bearer sk-two")
        assert (other.status, other.headers["x-ratelimit-remaining-tokens"]) == (200, "40")


def serving(**settings: Any) -> Service:
    """A service with ten places, four of which run."""
    service = Service("demo", ServerConfig(max_queue=6, **settings))
    llm: Any = SimpleNamespace(options=EngineConfig(max_requests=4), adapters=())
    service.open(llm)
    return service


def test_one_call_leaves_room_for_others() -> None:
    """It takes half of what is free at most; single replies get the last places."""
    service, one, two = serving(), Client("one"), Client("two")
    assert service.share(one) == 4  # more would wait for each other
    with pytest.raises(ApiError, match="6 replies at once, and 5 of one call have room") as told, service.room(one, 6):
        pass
    assert (told.value.status, told.value.param) == (400, "n")
    with service.room(one, 5):
        assert service.share(one) == 2
        with pytest.raises(ApiError) as told, service.room(one, 3):
            pass
        assert told.value.status == 503
        with service.room(two, 2), ExitStack() as singles:
            for _ in range(3):
                singles.enter_context(service.room(two, 1))
            with pytest.raises(ApiError) as told, service.room(two, 1):
                pass
            assert told.value.status == 503
    assert service.outstanding == 0


def test_a_client_is_held_to_its_replies_not_its_calls() -> None:
    service, one, two = serving(max_concurrent=3), Client("one"), Client("two")
    limits = service.limits
    with pytest.raises(ApiError, match="4 replies at once, and 3 of one call have room") as told, service.room(one, 4):
        pass
    assert told.value.status == 400
    with limits.running("one"), service.room(one, 2):  # the gate counts a call as one
        with limits.running("one"):
            assert service.share(one) == 1
            with pytest.raises(ApiError, match="3 replies of this client") as told, service.room(one, 2):
                pass
            assert told.value.status == 429
            with pytest.raises(ApiError), limits.running("one"):
                pass
        with limits.running("two"), service.room(two, 3):
            pass
    assert limits.left("one") == 3


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", '"NaN"'])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "seed"])
def test_numbers_that_are_none(server: Server, field: str, number: str) -> None:
    raw = json.dumps({"prompt": "a"})[:-1] + f', "{field}": {number}}}'
    assert server.call("POST", "/v1/completions", raw.encode()).status == 400


def test_a_client_that_does_not_read_is_let_go() -> None:
    """The application writes, and the client takes nothing: its request ends, and what it held is free."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.append(True)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    gate = Gate(app, Service("demo", ServerConfig(write_timeout=0.05)))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("127.0.0.1", 1)}
    asyncio.run(asyncio.wait_for(gate(scope, receive, send), timeout=5))
    assert ended == [True]


def test_a_slow_reader_stalls_nobody_and_is_let_go(demo_gguf: Path) -> None:
    """Over a real socket: what it does not read fills its buffers, and then its time runs."""
    with running(demo_gguf, "--write-timeout", "0.5") as server, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lazy.connect(("127.0.0.1", server.port))
        # each choice begins with the prompt's alternatives, most of a megabyte: more than buffers hold
        body = {"prompt": [7, 8, 9, 10] * 150, "echo": True, "logprobs": 20, "n": 16, "max_tokens": 1400}
        raw = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n"
        lazy.sendall(head.encode() + raw)
        ended = b'vllm:request_success_total{engine="0",finished_reason="abort",model_name="demo"} 16'
        deadline = time.monotonic() + 40
        while ended not in server.call("GET", "/metrics").raw:  # others are served while it blocks
            assert server.chat(max_tokens=1).status == 200
            assert time.monotonic() < deadline
