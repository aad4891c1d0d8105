"""A real server process with the demo model, on a free port of loopback."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's shape, whatever went wrong."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """The data of a stream that ended as it should."""
        assert self.headers["content-type"].startswith("text/event-stream")
        parts = [part for part in self.raw.decode().split("\n\n") if part and not part.startswith(":")]
        assert parts[-1] == "data: [DONE]"
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, raw, {"content-type": "application/json"} | headers)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chat(self, text: str = "What is the capital of France?", **fields: Any) -> Answer:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
        return self.call("POST", "/v1/chat/completions", body | fields)


@contextmanager
def running(model: Path, *options: str, before: Sequence[str] = ()) -> Iterator[Server]:
    """`qwenlet serve` until the block ends. `before`: a command that runs it."""
    command = [sys.executable, "-m", "qwenlet", "serve", str(model), "--port", "0", "--served-name", "demo", *options]
    command = [*before, *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        seen = ""
        for line in process.stderr:
            seen += line
            if line.strip() == "ready":
                break
        match = re.search(r"http://[^ ]*:(\d+)", seen)
        assert match is not None, seen
        assert "ready" in seen, seen
        yield Server(process, int(match.group(1)))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def server(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QWENLET_DATA", str(tmp_path_factory.mktemp("data")))
        with running(demo_gguf, "--quiet") as one:
            yield one
