"""Does the server stay what it was under a long mixed load? Clients of every kind at once, on loopback, for so long:

    whole answers and streams of all families, connections left in the middle of a stream or of a body, bodies that are
    cut, wrong or no JSON at all, tools, formats, embeddings, tokens, and a look at /metrics now and then

    python benchmarks/soak_server.py [MODEL] --minutes 30 [--clients 8] [--seed 0]

At the end all pages have to be back, no answer may have had a status that is not meant, and memory may not grow: the
first tenth of the time is left out, as caches fill. Time is this program's own, so that it may be stopped and go on:
what the server gave up meanwhile is counted, and no trouble. The last line is one JSON document; the exit status says
whether all held.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from own_time import OwnTime
from versus_server import free_port, memory_mb, serving

GROWTH_MB = 24.0  # of memory between the first tenth and the end
SAMPLE_SECONDS = 5.0
WORDS = "the quick brown fox jumps over a lazy dog while 我们 write ten short poems about bread".split()
TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
}
MEANT = {200, 400, 404, 429, 503}  # 503 is a full queue
GIVEN_UP = {408, 504}  # where the clock went on while all was stopped


class Client(threading.Thread):
    """One of the crowd: asks again and again, differently each time."""

    def __init__(self, port: int, seed: int, clock: OwnTime, until: float, statuses: Counter[str]) -> None:
        super().__init__()
        self.port, self.clock, self.until, self.statuses = port, clock, until, statuses
        self.draw = random.Random(seed)
        self.trouble: list[str] = []
        self.response: str | None = None
        self.began = 0.0

    def run(self) -> None:
        acts: list[tuple[int, Callable[[], None]]] = [
            (6, self.ask), (6, self.stream), (4, self.leave), (3, self.malformed), (2, self.cut), (2, self.others),
        ]  # fmt: skip
        while self.clock.now() < self.until:
            self.began = self.clock.now()
            (act,) = self.draw.choices([act for _, act in acts], [weight for weight, _ in acts])
            try:
                act()
            except (OSError, http.client.HTTPException, ValueError) as problem:
                self.trouble.append(f"{act.__name__}: {type(problem).__name__}: {problem}"[:200])

    # ------------------------------------------------------------------------------------------- what is asked

    def text(self) -> str:
        return " ".join(self.draw.choices(WORDS, k=self.draw.choice((3, 8, 40, 150))))

    def body(self) -> tuple[str, dict[str, Any]]:
        """A good one of any family that writes."""
        many, message = self.draw.choice((1, 8, 30, 60)), {"role": "user", "content": self.text()}
        warm = {"temperature": self.draw.choice((0, 1.0)), "seed": self.draw.randrange(99)}
        function = {"type": "function", "function": TOOL}
        schema = {"type": "json_schema", "json_schema": {"schema": TOOL["parameters"]}}
        chat = {"messages": [message], "max_tokens": many} | warm
        good: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"n": 2, "logprobs": True, "top_logprobs": 3}),
            ("/v1/chat/completions", chat | {"tools": [function], "tool_choice": "required"}),
            ("/v1/chat/completions", chat | {"tools": [function], "response_format": schema}),
            ("/v1/chat/completions", chat | {"response_format": {"type": "json_object"}}),
            ("/v1/completions", {"prompt": [self.text(), self.text()], "max_tokens": many, "ignore_eos": True} | warm),
            ("/v1/completions", {"prompt": self.text(), "max_tokens": 4, "echo": True, "logprobs": 2}),
            ("/v1/responses", {"input": self.text(), "max_output_tokens": many}),
            ("/v1/messages", {"messages": [message], "max_tokens": many}),
            ("/api/chat", {"messages": [message], "options": {"num_predict": many}}),
            ("/api/generate", {"prompt": self.text(), "options": {"num_predict": many}}),
        ]
        return self.draw.choice(good)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)

    def call(self, method: str, path: str, raw: bytes | None = None) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request(method, path, raw, {"content-type": "application/json"})
            answer = connection.getresponse()
            return self.count(path, answer.status), answer.read()
        finally:
            connection.close()

    def count(self, path: str, status: int) -> int:
        kept = path.startswith("/v1/responses/resp_")
        self.statuses[f"{'/v1/responses/ID' if kept else path} {status}"] += 1
        if status in GIVEN_UP and self.clock.stopped_since(self.began):
            self.statuses["given up while all was stopped"] += 1
        elif status not in MEANT:
            self.trouble.append(f"{path} answered {status}")
        return status

    def ask(self) -> None:
        path, body = self.body()
        status, raw = self.call("POST", path, json.dumps(body | {"stream": False}).encode())
        if path == "/v1/responses" and status == 200:
            self.response = json.loads(raw)["id"]

    def stream(self) -> None:
        """Read to its end, sometimes slowly."""
        path, body = self.body()
        _, raw = self.call("POST", path, json.dumps(body | {"stream": "echo" not in body}).encode())
        if b'"server_error"' in raw and b"overloaded" not in raw and not self.clock.stopped_since(self.began):
            self.trouble.append(f"{path} broke off: {raw[-200:]!r}")

    def leave(self) -> None:
        """Goes away in the middle of a stream."""
        path, body = self.body()
        connection = self.connect()
        try:
            raw = json.dumps(body | {"stream": True}).encode()
            connection.request("POST", path, raw, {"content-type": "application/json"})
            if self.draw.random() < 0.7:
                answer = connection.getresponse()
                self.count(path, answer.status)
                for _ in range(self.draw.randrange(5)):
                    answer.readline()
                time.sleep(self.draw.choice((0, 0.05, 0.5)))
        finally:
            connection.close()

    def malformed(self) -> None:
        path, body = self.body()
        good = json.dumps(body).encode()
        name = self.draw.choice(sorted(body))
        bad = self.draw.choice([
            b"", b"{", b"[]", b"null", b"\xff\xfe", good[: self.draw.randrange(len(good))], good + b"}",
            json.dumps(body | {name: self.draw.choice([-1, [], {"a": 1}, "\0", 1e300])}).encode(),
            b"[" * 20_000, b'{"messages": ' * 5_000,
        ])  # fmt: skip
        self.call("POST", path, bad)

    def cut(self) -> None:
        """A body of which only a part ever comes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n{")
            time.sleep(self.draw.choice((0, 0.2)))
        self.statuses["a body left in the middle"] += 1

    def others(self) -> None:
        path, body = self.draw.choice([
            ("/v1/embeddings", {"input": [self.text(), self.text()]}),
            ("/tokenize", {"prompt": self.text()}),
            ("/detokenize", {"tokens": [5, 6, 7]}),
            ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/responses/input_tokens", {"input": "a"}),
            ("/api/show", {"model": "demo"}),
            ("/v1/models", None), ("/api/tags", None), ("/api/ps", None), ("/health", None), ("/metrics", None),
            ("/no/such/path", None),
        ])  # fmt: skip
        self.call("GET" if body is None else "POST", path, None if body is None else json.dumps(body).encode())
        if self.response is not None:
            self.call("GET", f"/v1/responses/{self.response}")
            self.call("DELETE", f"/v1/responses/{self.response}")
            self.response = None


def gauge(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    told = connection.getresponse().read().decode()
    connection.close()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", told, re.MULTILINE))


def settled(port: int) -> dict[str, float]:
    """What is still held when nobody asks any more."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    held: dict[str, float] = {}
    for _ in range(300):
        held = {name: gauge(port, name) for name in names}
        if not any(held.values()):
            break
        time.sleep(0.2)
    return held


def slope(memory: list[float], seconds: float) -> float:
    """MB an hour, by least squares over samples that lie so many seconds apart."""
    mean = sum(memory) / len(memory)
    middle = (len(memory) - 1) / 2
    spread = sum((place - middle) ** 2 for place in range(len(memory)))
    rise = sum((place - middle) * (one - mean) for place, one in enumerate(memory))
    return rise / spread * 3600 / seconds if spread else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    port, statuses, clock = free_port(), Counter[str](), OwnTime()
    memory: list[float] = []
    period = min(SAMPLE_SECONDS, args.minutes * 2)
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "qwenlet", "serve", args.model, "--port", str(port), "--quiet"]
        # few pages, so that they run out and are found again all the time
        command += ["--served-name", "demo", "--cache-tokens", "4096"]
        with serving(["env", f"QWENLET_DATA={data}", *command], port, 2) as pid:
            until = clock.now() + args.minutes * 60
            crowd = [Client(port, args.seed * 1000 + number, clock, until, statuses) for number in range(args.clients)]
            for client in crowd:
                client.start()
            while any(client.is_alive() for client in crowd):
                due = clock.now() + period
                while clock.now() < due:
                    time.sleep(0.1)
                memory.append(memory_mb(pid))
            held = settled(port)
            failed_steps = gauge(port, "qwenlet:engine_failed_steps_total")
            healthy = Client(port, 0, clock, 0, statuses).call("GET", "/health")[0] == 200
    trouble = [one for client in crowd for one in client.trouble]
    early = memory[len(memory) // 10 : len(memory) // 10 + 5]
    growth = sum(memory[-5:]) / len(memory[-5:]) - sum(early) / len(early)
    for line in trouble[:20]:
        print(line)
    result = {
        "minutes": args.minutes,
        "answers": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "trouble": len(trouble),
        "held": held,
        "failed_steps": failed_steps,
        "healthy": healthy,
        "memory_mb": [round(one, 1) for one in memory[:: max(len(memory) // 20, 1)]],
        "growth_mb": round(growth, 1),
        "growth_limit_mb": GROWTH_MB,
        "slope_mb_per_hour": round(slope(memory[len(memory) // 10 :], period), 1),
    }
    print(json.dumps(result))
    sys.exit(bool(trouble or any(held.values()) or failed_steps or not healthy or growth > GROWTH_MB))


if __name__ == "__main__":
    main()
