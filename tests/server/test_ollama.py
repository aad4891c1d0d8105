"""Ollama's /api through the real server: lines of JSON, tools, what is known of the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from server.conftest import Server
from server.test_responses import FRANCE
from server.test_tools import TOOLS

GREEDY = {"temperature": 0, "num_predict": 24}


def chat(server: Server, **fields: Any) -> Any:
    body = {"model": "demo", "messages": [{"role": "user", "content": FRANCE}], "options": GREEDY}
    return server.call("POST", "/api/chat", body | fields)


def lines(answer: Any) -> list[Any]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.raw.decode().splitlines()]


def test_a_chat_and_its_lines(server: Server) -> None:
    whole = chat(server, stream=False).json
    assert "Paris" in whole["message"]["content"]
    assert (whole["done"], whole["done_reason"], whole["model"]) == (True, "stop", "demo")
    assert whole["eval_count"] > 0
    assert whole["total_duration"] >= whole["eval_duration"] > 0
    told = lines(chat(server))
    assert [line["done"] for line in told] == [False] * (len(told) - 1) + [True]
    assert len(told) > 2
    assert "".join(line["message"]["content"] for line in told) == whole["message"]["content"]
    assert told[-1]["eval_count"] == whole["eval_count"]
    assert chat(server, model="demo:latest", stream=False).status == 200


def test_generate_gives_the_same_reply(server: Server) -> None:
    body = {"model": "demo", "prompt": FRANCE, "options": GREEDY}
    whole = server.call("POST", "/api/generate", body | {"stream": False}).json
    assert whole["response"] == chat(server, stream=False).json["message"]["content"]
    assert "".join(line["response"] for line in lines(server.call("POST", "/api/generate", body))) == whole["response"]
    raw = server.call("POST", "/api/generate", body | {"stream": False, "raw": True}).json
    assert raw["prompt_eval_count"] < whole["prompt_eval_count"]
    loaded = server.call("POST", "/api/generate", {"model": "demo"}).json
    assert (loaded["done"], loaded["done_reason"], loaded["response"]) == (True, "load", "")


def test_options_are_honoured(server: Server) -> None:
    cut = chat(server, stream=False, options={"num_predict": 2}).json
    assert (cut["done_reason"], cut["eval_count"]) == ("length", 2)
    stopped = chat(server, stream=False, options=GREEDY | {"stop": "Paris"}).json
    assert "Paris" not in stopped["message"]["content"]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    held = chat(server, stream=False, format=schema).json
    assert json.loads(held["message"]["content"])["a"] in (1, 2)
    named = chat(server, stream=False, keep_alive="5m", options=GREEDY | {"num_ctx": 10, "mirostat": 1}, odd=1)
    assert named.headers["x-qwenlet-ignored"] == "options.num_ctx, keep_alive, odd, options.mirostat"


def test_results_follow_their_calls(server: Server) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Paris", "days": 1}}}
    talk = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "22 degrees"},
    ]
    answer = chat(server, messages=talk, tools=TOOLS, stream=False)
    assert answer.status == 200, answer.raw
    assert answer.json["prompt_eval_count"] > chat(server, messages=talk[:1], stream=False).json["prompt_eval_count"]
    assert chat(server, messages=talk[:2], tools=TOOLS, stream=False).status == 400


def test_the_model_is_shown(server: Server, demo_gguf: Path) -> None:
    (card,) = server.call("GET", "/api/tags").json["models"]
    assert (card["name"], card["details"]["parameter_size"]) == ("demo", "135M")
    assert (card["details"]["family"], card["details"]["format"]) == ("llama", "gguf")
    assert card["size"] == demo_gguf.stat().st_size
    assert card["digest"] == hashlib.sha256(demo_gguf.read_bytes()).hexdigest()
    (running,) = server.call("GET", "/api/ps").json["models"]
    assert running["context_length"] > 0
    shown = server.call("POST", "/api/show", {"model": "demo"}).json
    assert shown["capabilities"] == ["completion", "tools"]
    assert shown["details"] == card["details"]
    assert server.call("GET", "/api/version").json["version"]


BAD: dict[str, tuple[dict[str, Any], int]] = {
    "another model": ({"model": "llama"}, 404),
    "a role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400),
    "an image": ({"messages": [{"role": "user", "content": "x", "images": ["y"]}]}, 400),
    "a format": ({"format": "xml"}, 400),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, 400),
    "a call without a name": ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400),
    "a template": ({"template": "{{ .Prompt }}"}, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_told_in_ollamas_shape(server: Server, name: str) -> None:
    fields, status = BAD[name]
    answer = chat(server, **fields)
    assert answer.status == status, answer.raw
    assert isinstance(answer.json["error"], str)
