"""What clients of the server see: replies, streams, errors. One process serves all of these tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from server.conftest import Server, running

FRANCE = "What is the capital of France?"


def text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_a_chat(server: Server) -> None:
    answer = server.chat()
    assert answer.status == 200
    whole = answer.json
    assert "Paris" in text(whole)
    assert whole["object"] == "chat.completion"
    assert whole["id"].startswith("chatcmpl-")
    assert whole["model"] == "demo"
    counts = whole["usage"]
    assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_stream_adds_up_to_the_whole(server: Server) -> None:
    whole = server.chat(max_tokens=30).json
    events = server.chat(max_tokens=30, stream=True, stream_options={"include_usage": True}).events
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == text(whole)
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in events[:-1])


def test_choices_come_with_their_numbers(server: Server) -> None:
    settings = {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 8}
    whole = server.chat(**settings).json
    told = ["", "", ""]
    for event in server.chat(stream=True, **settings).events:
        (choice,) = event["choices"]
        told[choice["index"]] += choice["delta"].get("content", "")
    assert told == [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(told)) > 1
    single = server.chat(max_tokens=8).json["usage"]["prompt_tokens"]
    assert whole["usage"]["prompt_tokens"] == single


def test_log_probabilities(server: Server) -> None:
    (choice,) = server.chat(logprobs=True, top_logprobs=2, max_tokens=4).json["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_a_schema_holds_the_reply(server: Server) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    whole = server.chat(response_format=wanted, max_tokens=40).json
    assert json.loads(text(whole))["city"] in ("Paris", "Rome")


def test_the_last_message_goes_on(server: Server) -> None:
    messages = [{"role": "user", "content": FRANCE}, {"role": "assistant", "content": "The capital of France is"}]
    body = {"messages": messages, "continue_final_message": True, "temperature": 0, "max_tokens": 4}
    body["add_generation_prompt"] = False
    assert text(server.call("POST", "/v1/chat/completions", body).json).startswith(" Paris")


def test_developer_is_system_and_parts_are_joined(server: Server) -> None:
    def prompt(role: str, content: Any) -> list[int]:
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": content}]
        return server.call("POST", "/tokenize", {"messages": messages}).json["tokens"]

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the capital of France?"}]
    assert prompt("developer", parts) == prompt("system", FRANCE)


def test_completions_in_batches(server: Server) -> None:
    ids = server.call("POST", "/tokenize", {"prompt": "Once upon a time"}).json["tokens"]

    def texts(prompt: Any, **fields: Any) -> list[str]:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 6} | fields
        return [choice["text"] for choice in server.call("POST", "/v1/completions", body).json["choices"]]

    (alone,) = texts("Once upon a time")
    assert texts(ids) == [alone]
    assert texts(["Once upon a time", FRANCE])[0] == alone
    assert texts([ids, ids], n=2) == [alone] * 4
    body = {"prompt": ids, "temperature": 0, "max_tokens": 6, "stream": True}
    events = server.call("POST", "/v1/completions", body).events
    assert "".join(event["choices"][0]["text"] for event in events) == alone


def test_models(server: Server) -> None:
    (card,) = server.call("GET", "/v1/models").json["data"]
    assert card["id"] == "demo"
    assert server.call("GET", "/v1/models/demo").json == card
    missing = server.call("GET", "/v1/models/Qwen/Qwen-1_8B-Chat")
    assert missing.status == 404
    assert missing.error["code"] == "model_not_found"


def test_tokens_there_and_back(server: Server) -> None:
    ids = server.call("POST", "/tokenize", {"content": "Straße 🙂 <|im_end|>"}).json["tokens"]
    assert server.call("POST", "/detokenize", {"tokens": ids}).json["content"] == "Straße 🙂 <|im_end|>"


def test_fields_without_effect_are_named(server: Server) -> None:
    answer = server.chat(user="me", store=True, metadata={"a": "b"}, service_tier=None)
    assert answer.status == 200
    assert answer.headers["x-qwenlet-ignored"] == "user, store, metadata"


BAD: dict[str, tuple[Any, int, str | None]] = {
    "no JSON": (b"{", 400, None),
    "cut in a string": (b'{"messages": [{"role": "us', 400, None),
    "not UTF-8": (b'{"messages": [{"role": "\xff"}]}', 400, None),
    "not an object": ([], 400, None),
    "NaN": (b'{"messages": [], "temperature": NaN}', 400, None),
    "nested too deeply": (b'{"messages": [], "tool_choice": ' + b"[" * 50_000, 400, None),
    "half a surrogate pair": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
    "no messages": ({}, 400, None),
    "empty messages": ({"messages": []}, 400, "messages"),
    "unknown field": ({"messages": [], "temprature": 1}, 400, "temprature"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0].image_url",
    ),
    "a type": ({"messages": [], "max_tokens": "ten"}, 400, "max_tokens"),
    "a range": ({"messages": [], "top_p": 0}, 400, "top_p"),
    "refused by name": ({"messages": [], "audio": {"voice": "x"}}, 400, "audio"),
    "tools": ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
    "another model": ({"messages": [], "model": "gpt-7"}, 404, "model"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "messages"),
    "no schema": (
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema.schema",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(server: Server, name: str) -> None:
    body, status, param = BAD[name]
    answer = server.call("POST", "/v1/chat/completions", body)
    assert (answer.status, answer.error["param"]) == (status, param), answer.raw


def test_the_context_is_counted(server: Server) -> None:
    error = server.chat("word " * 9000).error
    assert error["code"] == "context_length_exceeded"
    assert "9" in error["message"]
    assert "8192" in error["message"] or "2048" in error["message"]


def test_unknown_paths_and_methods_answer_in_shape(server: Server) -> None:
    assert server.call("GET", "/v2/nothing").error["type"] == "not_found_error"
    assert server.call("GET", "/v1/chat/completions").status == 405
    assert server.call("GET", "/v1/chat/completions").error


def test_a_large_body_is_refused_unread(server: Server) -> None:
    answer = server.call("POST", "/v1/chat/completions", b"x" * 100_000_000)
    assert answer.status == 413
    assert answer.error["code"] == "body_too_large"


def test_a_client_that_leaves_ends_its_request(server: Server) -> None:
    """The one seat of the queue's far end: a reply of 1,500 tokens would hold the engine for many seconds."""
    connection = server.connect()
    body = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 1500, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()
    began = time.monotonic()
    assert server.chat(max_tokens=1).status == 200
    assert time.monotonic() - began < 5.0


def test_keys_and_limits(demo_gguf: Path) -> None:
    with running(demo_gguf, "--api-key", "sk-one", "--api-key", "sk-two", "--max-concurrent", "1") as guarded:
        for key in ("sk-one", "sk-two"):
            assert guarded.call("GET", "/v1/models", authorization=f"Bearer {key}").status == 200
        for wrong in ({}, {"authorization": "Bearer sk-onf"}, {"authorization": "Bearer "}, {"x-api-key": "sk-on"}):
            answer = guarded.call("GET", "/v1/models", **wrong)
            assert answer.status == 401
            assert answer.error["type"] == "authentication_error"
        assert guarded.call("GET", "/health").status == 200
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}
        answers: list[int] = []

        def ask() -> None:
            answers.append(guarded.call("POST", "/v1/completions", body, authorization="Bearer sk-one").status)

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert sorted(answers) == [200, 429]


def test_a_running_reply_ends_after_sigterm(demo_gguf: Path) -> None:
    with running(demo_gguf) as ending:
        connection = ending.connect()
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        first = response.readline()
        ending.process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
        connection.close()
        assert first.startswith(b"data: ")
        assert rest.rstrip().endswith("data: [DONE]")
        assert '"finish_reason":"length"' in rest
        assert ending.process.wait(timeout=30) == 0


def test_a_public_address_needs_a_key(demo_gguf: Path) -> None:
    command = [sys.executable, "-m", "qwenlet", "serve", str(demo_gguf), "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "no API key is asked for" in done.stderr
