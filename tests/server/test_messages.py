"""/v1/messages through the real server, as Anthropic's clients read it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.conftest import Server
from server.test_responses import FRANCE
from server.test_tools import CLOCK, WEATHER

TOOLS = [
    {"name": t["name"], "description": t["description"], "input_schema": t["parameters"]} for t in (WEATHER, CLOCK)
]
NAMED = {"type": "tool", "name": "weather"}


def write(server: Server, text: Any = FRANCE, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24} | fields
    return server.call("POST", "/v1/messages", body)


def events(answer: Any) -> list[Any]:
    found = []
    for part in answer.raw.decode().split("\n\n"):
        if part:
            name, data = part.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return [event for event in found if event["type"] != "ping"]


def test_fields_of_blocks_that_nothing_reads_are_named(server: Server) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    answer = write(
        server,
        [{"type": "text", "text": FRANCE, **cached}],
        system=[{"type": "text", "text": "Be brief.", **cached}],
        tools=[TOOLS[0] | cached],
        max_tokens=2,
    )
    assert answer.status == 200, answer.raw
    named = {"system[].cache_control", "tools[].cache_control", "messages[].content[].cache_control"}
    assert set(answer.headers["x-qwenlet-ignored"].split(", ")) == named


def test_a_message(server: Server) -> None:
    answer = write(server, system=[{"type": "text", "text": "Be brief."}])
    assert answer.status == 200, answer.raw
    whole = answer.json
    assert whole["id"].startswith("msg_")
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "end_turn")
    assert "Paris" in whole["content"][0]["text"]
    body = {"messages": [{"role": "user", "content": FRANCE}], "system": "Be brief."}
    counted = server.call("POST", "/v1/messages/count_tokens", body).json
    counts = whole["usage"]
    assert counted == {"input_tokens": counts["input_tokens"] + counts["cache_read_input_tokens"]}


def test_the_events_add_up_to_the_message(server: Server) -> None:
    whole = write(server).json
    told = events(write(server, stream=True))
    kinds = [event["type"] for event in told if event["type"] != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert told[0]["message"]["content"] == []
    assert told[0]["message"]["usage"]["input_tokens"] > 0
    text = "".join(e["delta"]["text"] for e in told if e["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]
    assert told[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert told[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_what_ended_the_message_is_said(server: Server) -> None:
    assert write(server, max_tokens=2).json["stop_reason"] == "max_tokens"
    stopped = write(server, stop_sequences=["never", "Paris"]).json
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "Paris")
    assert "Paris" not in stopped["content"][0]["text"]


def test_a_begun_answer_goes_on(server: Server) -> None:
    begun = [{"role": "user", "content": FRANCE}, {"role": "assistant", "content": "The capital of France is"}]
    assert write(server, messages=begun).json["content"][0]["text"].startswith(" Paris")


def test_a_tool_is_used_and_its_result_read(server: Server) -> None:
    fields = {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 120}
    whole = write(server, "What is the weather in Paris?", **fields).json
    assert whole["stop_reason"] == "tool_use"
    (block,) = whole["content"]
    assert (block["type"], block["name"], set(block["input"])) == ("tool_use", "weather", {"city", "days"})
    told = events(write(server, "What is the weather in Paris?", stream=True, **fields))
    (start,) = [e for e in told if e["type"] == "content_block_start"]
    assert (start["content_block"]["name"], start["content_block"]["input"]) == ("weather", {})
    written = "".join(e["delta"]["partial_json"] for e in told if e["type"] == "content_block_delta")
    assert json.loads(written) == block["input"]
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "22 degrees"}]}
    talk = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": [result]},
    ]
    after = write(server, messages=talk, tools=TOOLS)
    assert after.status == 200, after.raw
    assert write(server, messages=talk[:2], tools=TOOLS).status == 400
    chosen = write(server, tools=TOOLS, tool_choice={"type": "any"}, max_tokens=120).json
    assert chosen["stop_reason"] == "tool_use"


def test_fields_that_are_not_known_are_named(server: Server) -> None:
    answer = write(server, metadata={"user_id": "x"}, betas=["x"], max_tokens=1)
    assert answer.status == 200
    assert answer.headers["x-qwenlet-ignored"] == "metadata, betas"


BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "no messages": ({"messages": []}, "messages"),
    "no limit": ({"max_tokens": None}, "max_tokens"),
    "a role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
    "a server's tool": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
    "a choice": ({"tools": TOOLS, "tool_choice": {"type": "maybe"}}, "tool_choice"),
    "a choice that is no text": ({"tools": TOOLS, "tool_choice": {"type": ["tool"]}}, "tool_choice"),
    "no such tool": ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_told_in_anthropics_shape(server: Server, name: str) -> None:
    fields, param = BAD[name]
    answer = write(server, **fields)
    told = answer.json
    assert (answer.status, told["type"], told["error"]["type"]) == (400, "error", "invalid_request_error")
    assert told["error"]["param"] == param
    assert write(server, model="other").json["error"]["type"] == "not_found_error"
