"""Schemas that are huge or name themselves, in every place that takes one: served where they mean something, and
refused with words where they don't or cost too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.conftest import Server

USER = {"role": "user", "content": "Write a list of two."}
Around = Callable[[Any], dict[str, Any]]
PLACES: dict[str, tuple[str, Around]] = {
    "response_format": ("/v1/chat/completions", lambda schema: {
        "messages": [USER], "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}),
    "a forced tool": ("/v1/chat/completions", lambda schema: {
        "messages": [USER], "max_tokens": 90, "tool_choice": "required",
        "tools": [{"type": "function", "function": {"name": "keep", "parameters": schema}}]}),
    "guided_json": ("/v1/completions", lambda schema: {"prompt": "a", "max_tokens": 60, "guided_json": schema}),
    "text.format": ("/v1/responses", lambda schema: {
        "input": "a", "max_output_tokens": 60, "store": False,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}),
    "input_schema": ("/v1/messages", lambda schema: {
        "messages": [USER], "max_tokens": 90, "tool_choice": {"type": "any"},
        "tools": [{"name": "keep", "input_schema": schema}]}),
    "format": ("/api/generate", lambda schema: {
        "prompt": "a", "format": schema, "stream": False, "options": {"num_predict": 60}}),
}  # fmt: skip
MEGABYTE: dict[str, Any] = {
    "properties": {"type": "object", "properties": {f"field_{each}": {"type": "string"} for each in range(30_000)}},
    "enum": {"type": "object", "properties": {"a": {"enum": [f"value {each} of many" for each in range(50_000)]}}},
    "references": {
        "$defs": {f"d{each}": {"$ref": f"#/$defs/d{each + 1}"} for each in range(30_000)},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/d0"}},
    },
}
# objects, so that they may be a tool's parameters
ENDLESS: dict[str, Any] = {
    "itself": {"$ref": "#"},
    "each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "nowhere": {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}},
    "elsewhere": {"type": "object", "properties": {"a": {"$ref": "https://example.com/a.json"}}},
    "a file": {"type": "object", "properties": {"a": {"$ref": "file:///etc/passwd"}}},
}
LIST = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}


def words(path: str, told: Any) -> str:
    error = told["error"]
    return error if path.startswith("/api/") else error["message"]


@pytest.mark.parametrize("schema", MEGABYTE)
@pytest.mark.parametrize("place", PLACES)
def test_a_megabyte_is_refused(server: Server, place: str, schema: str) -> None:
    path, around = PLACES[place]
    body = around(MEGABYTE[schema])
    assert len(json.dumps(body)) > 900_000
    answer = server.call("POST", path, body)
    assert answer.status == 400, answer.raw[:300]
    assert len(words(path, answer.json)) < 1000


@pytest.mark.parametrize("schema", ENDLESS)
@pytest.mark.parametrize("place", PLACES)
def test_what_has_no_end_is_refused(server: Server, place: str, schema: str) -> None:
    path, around = PLACES[place]
    answer = server.call("POST", path, around(ENDLESS[schema]))
    assert answer.status == 400, answer.raw[:300]
    assert b"root:" not in answer.raw  # nothing was read for it


def test_what_no_value_ends_is_cut(server: Server) -> None:
    """Each beginning of it may go on, so it compiles; the reply ends where all replies do."""
    schema = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    path, around = PLACES["response_format"]
    answer = server.call("POST", path, around(schema))
    assert answer.status == 200, answer.raw
    (choice,) = answer.json["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].count('"next"') > 1


@pytest.mark.parametrize("place", ["response_format", "guided_json", "text.format", "format"])
def test_what_may_end_is_served(server: Server, place: str) -> None:
    """A list of any length: the reply is the beginning of one, or a whole one."""
    path, around = PLACES[place]
    answer = server.call("POST", path, around(LIST))
    assert answer.status == 200, answer.raw[:300]
    told = answer.json
    if path == "/v1/responses":
        text = told["output"][0]["content"][0]["text"]
    elif path.startswith("/api/"):
        text = told["response"]
    else:
        text = told["choices"][0].get("text") or told["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{")
    assert '"value"' in text
