"""Tools through the real server. The demo model can't call by itself, so its calls are forced by the grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.conftest import Server

WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
    },
}
CLOCK = {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]
NAMED = {"type": "function", "function": {"name": "weather"}}
ASK = {"role": "user", "content": "What is the weather in Paris?"}


def ask(server: Server, **fields: Any) -> Any:
    return server.chat(ASK["content"], **{"tools": TOOLS, "max_tokens": 120} | fields)


def test_a_named_tool_is_called_as_its_schema_says(server: Server) -> None:
    (choice,) = ask(server, tool_choice=NAMED).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9


def test_a_required_call_is_of_one_of_the_tools(server: Server) -> None:
    (choice,) = ask(server, tool_choice="required").json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "clock")
    json.loads(call["function"]["arguments"])


def test_only_allowed_tools_are_called(server: Server) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    (choice,) = ask(server, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}).json["choices"]
    function = choice["message"]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("clock", {})


def test_a_streamed_call_has_its_index_and_one_name(server: Server) -> None:
    (whole,) = ask(server, tool_choice=NAMED).json["choices"]
    events = ask(server, tool_choice=NAMED, stream=True).events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    pieces = [d for e in events for d in e["choices"][0]["delta"].get("tool_calls", ())]
    first, *rest = pieces
    assert first["index"] == 0
    assert first["id"].startswith("call_")
    assert first["function"] == {"name": "weather", "arguments": ""}
    assert len(rest) > 1
    assert all(set(piece) == {"index", "function"} and piece["index"] == 0 for piece in rest)
    assert all(set(piece["function"]) == {"arguments"} for piece in rest)
    written = "".join(piece["function"]["arguments"] for piece in pieces)
    assert written == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"][0]["finish_reason"]] == ["tool_calls"]
    assert not any(e["choices"][0]["delta"].get("content") for e in events)


def test_a_format_beside_free_tools_holds_the_answer(server: Server) -> None:
    """A call or an answer: the demo model picks, and either is as was asked."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": schema | {"additionalProperties": False}},
    }
    for fields in ({"temperature": 0}, {"temperature": 1, "seed": 1}, {"temperature": 1, "seed": 2}):
        (choice,) = ask(server, response_format=wanted, max_tokens=400, **fields).json["choices"]
        if choice["finish_reason"] == "tool_calls":
            json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
        else:
            assert choice["finish_reason"] == "stop"
            assert json.loads(choice["message"]["content"]) == {"city": "Paris"}


def test_a_format_of_a_forced_call_is_named(server: Server) -> None:
    answer = ask(server, tool_choice=NAMED, response_format={"type": "json_object"})
    assert answer.json["choices"][0]["finish_reason"] == "tool_calls"
    assert answer.headers["x-qwenlet-ignored"] == "response_format"


def test_legacy_functions_answer_in_their_own_form(server: Server) -> None:
    fields = {"tools": None, "functions": [WEATHER], "function_call": {"name": "weather"}}
    (choice,) = ask(server, **fields).json["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"]["name"] == "weather"
    assert "tool_calls" not in choice["message"]
    told = {"name": "", "arguments": ""}
    for event in ask(server, stream=True, **fields).events:
        for key, piece in event["choices"][0]["delta"].get("function_call", {}).items():
            told[key] += piece
    assert told == choice["message"]["function_call"]


def test_a_result_leads_to_an_answer(server: Server) -> None:
    (choice,) = ask(server, tool_choice=NAMED).json["choices"]
    call = choice["message"]["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "22 degrees and sunny"}
    body = {"messages": [ASK, choice["message"], result], "tools": TOOLS, "max_tokens": 40, "temperature": 0}
    answer = server.call("POST", "/v1/chat/completions", body)
    assert answer.status == 200, answer.raw
    message = answer.json["choices"][0]["message"]
    assert message.get("content") or message.get("tool_calls") or message.get("reasoning_content")
    plain = server.call("POST", "/v1/chat/completions", body | {"messages": [ASK]}).json
    assert answer.json["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 10


def test_no_tools_are_told_of_where_none_may_be_called(server: Server) -> None:
    without = server.chat(ASK["content"], max_tokens=8).json
    none = ask(server, tool_choice="none", max_tokens=8).json
    assert none["usage"] == without["usage"] | {"prompt_tokens_details": none["usage"]["prompt_tokens_details"]}
    assert none["choices"] == without["choices"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"tools": [{"type": "function", "function": {}}]}, "tools"),
    "not known here": ({"tools": [{"type": "web_search"}]}, "tools"),
    "twice": ({"tools": TOOLS + TOOLS}, "tools"),
    "both": ({"functions": [WEATHER]}, "functions"),
    "another choice": ({"tool_choice": "maybe"}, "tool_choice"),
    "no such tool": ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    "required of none": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "a result of nothing": ({"messages": [ASK, {"role": "tool", "content": "x", "tool_call_id": "y"}]}, ""),
    "an answer of another call": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "clock", "arguments": "{}"}}]},
                {"role": "tool", "content": "x", "tool_call_id": "b"},
            ]
        },
        "",
    ),
    "a call without a name": (
        {"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        "messages[1]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tools(server: Server, name: str) -> None:
    fields, param = BAD[name]
    answer = ask(server, **fields)
    assert (answer.status, answer.error["param"] or "") == (400, param), answer.raw
