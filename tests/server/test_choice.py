"""Tools that a reply may call or not, through HTTP: the model's words are scripted, everything else is the server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.scripted import saying
from server.test_messages import TOOLS as BLOCKS
from server.test_messages import events as message_events
from server.test_responses import FLAT
from server.test_responses import events as response_events
from server.test_tools import ASK, TOOLS

ARGUMENTS = '{"city": "Paris", "days": 2}'
CALL = f"Thought: I have to look.\nAction: weather\nAction Input: {ARGUMENTS}\nObservation: 40 degrees and"
TWO = CALL.partition("\nObs")[0] + "\nAction: clock\nAction Input: {}\nObservation:"
ANSWER = "Thought: I now know the final answer.\nFinal Answer: It is 22 degrees."
PLAIN = "It is 22 degrees."
CHAT: dict[str, Any] = {"messages": [ASK], "tools": TOOLS}


def chat(said: str, **fields: Any) -> tuple[Any, Any]:
    """The choice, whole and put together from its stream."""
    with saying(said) as scripted:
        (whole,) = scripted.server.call("POST", "/v1/chat/completions", CHAT | fields).json["choices"]
        events = scripted.server.call("POST", "/v1/chat/completions", CHAT | fields | {"stream": True}).events
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    for event in events:
        delta = event["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(message["tool_calls"])
                message["tool_calls"].append({"name": piece["function"]["name"], "arguments": ""})
            message["tool_calls"][piece["index"]]["arguments"] += piece["function"]["arguments"]
    streamed = {"message": message, "finish_reason": events[-1]["choices"][0]["finish_reason"]}
    return whole, streamed


def test_a_reply_that_calls() -> None:
    for one in chat(CALL):
        assert one["finish_reason"] == "tool_calls"
        (call,) = one["message"]["tool_calls"]
        call = call.get("function", call)
        assert (call["name"], call["arguments"]) == ("weather", ARGUMENTS)
        assert not one["message"]["content"]


@pytest.mark.parametrize("said", [ANSWER, PLAIN])
def test_a_reply_that_answers(said: str) -> None:
    for one in chat(said, tool_choice="auto"):
        assert one["finish_reason"] == "stop"
        assert one["message"]["content"] == "It is 22 degrees."
        assert not one["message"].get("tool_calls")


def test_one_call_unless_several_are_allowed() -> None:
    for parallel, names in ((None, ["weather"]), (False, ["weather"]), (True, ["weather", "clock"])):
        whole, streamed = chat(TWO, parallel_tool_calls=parallel)
        assert [call["function"]["name"] for call in whole["message"]["tool_calls"]] == names
        assert [call["name"] for call in streamed["message"]["tool_calls"]] == names


def test_without_a_choice_nothing_is_a_call() -> None:
    for one in chat(CALL, tool_choice="none"):
        assert one["finish_reason"] == "stop"
        assert one["message"]["content"] == CALL
        assert not one["message"].get("tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_responses(stream: bool) -> None:
    body = {"input": ASK["content"], "tools": FLAT, "store": False, "stream": stream}
    with saying(CALL) as scripted:
        answer = scripted.server.call("POST", "/v1/responses", body)
    whole = response_events(answer)[-1]["response"] if stream else answer.json
    (call,) = [item for item in whole["output"] if item["type"] == "function_call"]
    assert (call["name"], call["arguments"], call["status"]) == ("weather", ARGUMENTS, "completed")


@pytest.mark.parametrize("stream", [False, True])
def test_messages(stream: bool) -> None:
    body = {"messages": [ASK], "tools": BLOCKS, "max_tokens": 500, "stream": stream}
    with saying(CALL) as scripted:
        answer = scripted.server.call("POST", "/v1/messages", body)
    if not stream:
        assert answer.json["stop_reason"] == "tool_use"
        assert answer.json["content"][-1]["input"] == json.loads(ARGUMENTS)
        return
    found = message_events(answer)
    written = [e["delta"]["partial_json"] for e in found if e.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(written) == ARGUMENTS
    assert [e["delta"]["stop_reason"] for e in found if e["type"] == "message_delta"] == ["tool_use"]


def test_ollama() -> None:
    with saying(CALL) as scripted:
        whole = scripted.server.call("POST", "/api/chat", CHAT | {"stream": False}).json
        lines = scripted.server.call("POST", "/api/chat", CHAT).raw.decode().splitlines()
    streamed = [call for line in lines for call in json.loads(line)["message"].get("tool_calls", ())]
    for calls in (whole["message"]["tool_calls"], streamed):
        assert [call["function"] for call in calls] == [{"name": "weather", "arguments": json.loads(ARGUMENTS)}]


def test_a_format_holds_the_answer_beside_the_calls() -> None:
    """The grammar that goes to the engine has both ways in it."""
    with saying(ANSWER) as scripted:
        wanted = {"response_format": {"type": "json_object"}}
        assert scripted.server.call("POST", "/v1/chat/completions", CHAT | wanted).status == 200
        (asked,) = scripted.script.asked
    assert "Final Answer: " in asked.lark
    assert "Action: weather" in asked.lark
