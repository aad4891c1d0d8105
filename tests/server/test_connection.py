"""Clients that send no whole head, or read nothing: before any key was shown, and after the last byte was written."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from server.conftest import Server, running

HEAD = b"GET /version HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def hasty(demo_gguf: Path) -> Iterator[Server]:
    with running(demo_gguf, "--quiet", "--idle-timeout", "1.5") as one:
        yield one


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", HEAD, HEAD + b"\r\n", HEAD + b"\r\n\r\n", HEAD + b"\r\n" + HEAD])
def test_what_is_no_request_is_closed(hasty: Server, sent: bytes) -> None:
    """Nothing, half a head, an answered request with nothing or half a head behind it."""
    with connected(hasty) as connection:
        connection.sendall(sent)
        found = rest(connection)
    statuses = re.findall(rb"HTTP/1.1 (\d+)", found)
    answered, half = sent.count(HEAD + b"\r\n"), sent.endswith(b"host: localhost\r\n")
    assert statuses == [b"200"] * answered + [b"408"] * half


def test_a_head_that_drips_is_cut(hasty: Server) -> None:
    began = time.monotonic()
    with connected(hasty) as connection, suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(HEAD)
        while time.monotonic() - began < 20:
            connection.sendall(b"x-more: 1\r\n")
            time.sleep(0.05)
    assert time.monotonic() - began < 10


def test_a_slow_head_in_time_is_served(hasty: Server) -> None:
    with connected(hasty) as connection:
        for piece in (HEAD, b"x-more: 1\r\nconnection: close\r\n", b"\r\n"):
            time.sleep(0.15)
            connection.sendall(piece)
        assert rest(connection).startswith(b"HTTP/1.1 200")


def test_a_long_reply_outlives_the_wait_for_heads(hasty: Server) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True})
    connection, began = hasty.connect(), time.monotonic()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response, lines = connection.getresponse(), 0
    while time.monotonic() - began < 3.0:
        if not (line := response.readline()):
            break
        lines += line.startswith(b"data: ")
    assert lines == 1501 or line
    connection.close()


LARGE = {
    "one header": HEAD + b"x: " + b"a" * 66_000 + b"\r\n\r\n",
    "many": HEAD + b"a: b\r\n" * 12_000 + b"\r\n",
    "the request line": b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\n\r\n",
    "one without an end": HEAD + b"x: " + b"a" * 400_000,
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_head_is_refused(server: Server, name: str) -> None:
    with connected(server) as connection:
        found = b""
        try:
            for at in range(0, len(LARGE[name]), 16_000):
                connection.sendall(LARGE[name][at : at + 16_000])
                time.sleep(0.01)
            found = rest(connection)
        except (ConnectionResetError, BrokenPipeError):
            assert name == "one without an end"  # cut while it was sent
        assert found.startswith(b"HTTP/1.1 431") or name == "one without an end"


def test_headers_of_a_usual_size_are_taken(server: Server) -> None:
    assert server.call("GET", "/version", cookie="a" * 30_000, x="b" * 30_000).status == 200


def test_who_reads_nothing_is_cut_off(demo_gguf: Path) -> None:
    """What it left unread would keep its connection, and a server that is to end would wait for it."""
    options = ("--quiet", "--write-timeout", "0.5", "--drain-timeout", "50")
    with running(demo_gguf, *options) as server, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lazy.connect(("127.0.0.1", server.port))
        # more than the system's buffers hold
        lazy.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 400)
        time.sleep(3.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=25) == 0
