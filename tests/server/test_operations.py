"""Metrics, embeddings, documents: what stands around the replies."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import struct
import time
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message

from qwenlet.config import ServerConfig
from qwenlet.engine.driver import Health
from qwenlet.server.app import build
from qwenlet.server.service import Service
from server.conftest import Server


def metric(server: Server, name: str, **labels: str) -> float:
    """The value of one series; 0 where it does not show yet."""
    for line in server.call("GET", "/metrics").raw.decode().splitlines():
        if match := re.fullmatch(rf"{re.escape(name)}(?:{{(.*)}})? (\S+)", line):
            shown = dict(re.findall(r'(\w+)="(.*?)"', match.group(1) or ""))
            if labels.items() <= shown.items():
                return float(match.group(2))
    return 0.0


def test_metrics_count(server: Server) -> None:
    before = metric(server, "vllm:generation_tokens_total")
    finished = metric(server, "vllm:request_success_total", finished_reason="length")
    server.chat(max_tokens=5, ignore_eos=True)
    assert metric(server, "vllm:generation_tokens_total") == before + 5
    assert metric(server, "vllm:request_success_total", finished_reason="length") == finished + 1
    page = server.call("GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    text = page.raw.decode()
    for kind in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert metric(server, f"vllm:{kind}_seconds_count") >= 1.0, kind
    whole = metric(server, "vllm:e2e_request_latency_seconds_sum")
    assert whole > metric(server, "vllm:request_decode_time_seconds_sum") > 0.0
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
                 "vllm:prefix_cache_hits_total", "vllm:prompt_tokens_total",
                 "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_sum"):  # fmt: skip
        assert f"\n{name}{{" in text, name
    count = metric(server, "vllm:time_to_first_token_seconds_count")
    assert metric(server, "vllm:time_to_first_token_seconds_bucket", le="+Inf") == count > 0
    assert metric(server, "qwenlet:http_responses_total", code="200") > 0


def test_a_reply_that_has_called_enough_ends_well(server: Server) -> None:
    """A second call is not wanted: the reply is stopped at it, which is no abort."""
    before = {why: metric(server, "vllm:request_success_total", finished_reason=why) for why in ("stop", "abort")}
    tool = {"type": "function", "function": {"name": "clock"}}
    call = "Action: clock\nAction Input: \\{\\}\n"
    held = {"guided_regex": f"Thought: a\n{call}{call}[a-z]{{2000}}", "max_tokens": 3000}
    (choice,) = server.chat("What time is it?", tools=[tool], **held).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert len(choice["message"]["tool_calls"]) == 1
    after = {why: metric(server, "vllm:request_success_total", finished_reason=why) for why in ("stop", "abort")}
    assert after == before | {"stop": before["stop"] + 1}


def test_a_client_that_leaves_is_cancelled_within_a_step(server: Server) -> None:
    cancelled = metric(server, "vllm:request_success_total", finished_reason="abort")
    connection = server.connect()
    body = {"prompt": "Count.", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.readline()
    assert metric(server, "vllm:num_requests_running") == 1
    response.close()
    connection.close()
    written, deadline = metric(server, "vllm:generation_tokens_total"), time.monotonic() + 5
    while metric(server, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
    assert metric(server, "vllm:generation_tokens_total") - written < 20
    assert metric(server, "vllm:request_success_total", finished_reason="abort") == cancelled + 1
    assert metric(server, "vllm:kv_cache_usage_perc") == 0.0


@pytest.mark.parametrize("sent", ["a whole request", "half a body"])
def test_a_client_that_leaves_is_no_failure_of_the_server(server: Server, sent: str) -> None:
    def counted(code: str) -> float:
        return metric(server, "qwenlet:http_responses_total", code=code)

    left, failed = counted("499"), counted("500")
    body = json.dumps({"prompt": "Count.", "max_tokens": 1500, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + (body if sent == "a whole request" else body[:20]))
        time.sleep(0.2)
    deadline = time.monotonic() + 10
    while counted("499") == left:
        assert time.monotonic() < deadline
    assert (counted("499"), counted("500")) == (left + 1, failed)


def embed(server: Server, given: Any, **fields: Any) -> list[Any]:
    answer = server.call("POST", "/v1/embeddings", {"input": given} | fields)
    assert answer.status == 200, answer.raw
    assert "mean-pooled" in answer.headers["x-qwenlet-embedding"]
    return [each["embedding"] for each in answer.json["data"]]


def test_embeddings(server: Server) -> None:
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose by two percent."]
    vectors = embed(server, texts)
    (alone,) = embed(server, texts[0])
    assert alone == vectors[0]

    def alike(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    assert alike(vectors[0], vectors[1]) > alike(vectors[0], vectors[2])
    (packed,) = embed(server, texts[0], encoding_format="base64")
    assert list(struct.unpack(f"<{len(alone)}f", base64.b64decode(packed))) == pytest.approx(alone)
    ids = server.call("POST", "/tokenize", {"prompt": texts[0]}).json["tokens"]
    assert embed(server, [ids, ids]) == [alone, alone]
    assert len(embed(server, "word " * 700, dimensions=len(alone))[0]) == len(alone)


def test_more_inputs_than_have_room_run_in_slices(server: Server) -> None:
    few = embed(server, ["a cat", "a dog"])
    many = embed(server, ["a cat", "a dog"] * 200)
    assert many == few * 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a", "dimensions": 7}, "dimensions"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": ["a", "word " * 9000]}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, None),
        ({"input": [10**9]}, None),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "word " * 9000}, "input"),
    ],
)
def test_bad_embeddings(server: Server, body: Any, param: str | None) -> None:
    answer = server.call("POST", "/v1/embeddings", body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.raw


def test_documents_load_nothing_from_elsewhere(server: Server) -> None:
    page = server.call("GET", "/docs").raw.decode()
    assert "messages[].name" in page
    assert "http://" not in page
    assert "https://" not in page
    schema = server.call("GET", "/openapi.json").json
    assert {"/v1/chat/completions", "/v1/embeddings", "/metrics"} <= set(schema["paths"])
    assert "ChatRequest" in schema["components"]["schemas"]


def asked(service: Service, path: str) -> tuple[int, dict[str, str], Any]:
    """What a caller without a key is told; status, headers, body."""
    sent: list[Any] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "client": ("::1", 1)}
    asyncio.run(build(service)(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, json.loads(sent[1]["body"])


def with_engine(health: Health) -> Service:
    service = Service("demo", ServerConfig(api_key=("sk-one",)))
    engine: Any = SimpleNamespace(health=health, busy=False)
    service.open(SimpleNamespace(adapters=(), engine=engine))  # type: ignore[arg-type]
    return service


def test_health_while_the_model_is_loaded_and_at_the_end() -> None:
    loading = Service("demo", ServerConfig())
    for path in ("/health", "/ready"):
        status, headers, told = asked(loading, path)
        assert (status, told) == (503, {"status": "loading"})
        assert int(headers["retry-after"]) >= 1
    ready = with_engine(Health(True))
    assert asked(ready, "/health")[::2] == (200, {"status": "ok"})
    assert asked(ready, "/ready")[::2] == (200, {"status": "ready"})
    ready.state = "draining"
    assert asked(ready, "/health")[::2] == (200, {"status": "draining"})
    status, headers, told = asked(ready, "/ready")
    assert (status, told) == (503, {"status": "draining"})
    assert int(headers["retry-after"]) >= 1


def test_health_tells_nobody_without_a_key_what_broke() -> None:
    broken = with_engine(Health(False, "RuntimeError: /home/me/secret"))
    status, _, told = asked(broken, "/health")
    assert (status, told["status"]) == (503, "error")
    assert "secret" not in told["reason"]
    assert "secret" in (broken.trouble(in_full=True) or "")
