"""Fields within tools, calls and items, and fields that exclude each other: each acts, is named, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server.scripted import Scripted, saying
from server.test_messages import TOOLS as BLOCKS
from server.test_responses import FLAT
from server.test_tools import ASK, CLOCK, NAMED, TOOLS, WEATHER

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}}
FORMAT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
STRICT = [{"type": "function", "function": WEATHER | {"strict": True}}]


@pytest.fixture(scope="module")
def scripted() -> Iterator[Scripted]:
    with saying("It is 22 degrees.") as one:
        yield one


def ask(scripted: Scripted, path: str, body: dict[str, Any]) -> Any:
    first: dict[str, Any] = {"input": "Hello"} if path == "/v1/responses" else {"messages": [ASK]}
    return scripted.server.call("POST", path, first | body)


def named(answer: Any) -> set[str]:
    assert answer.status == 200, answer.raw
    return set(filter(None, answer.headers.get("x-qwenlet-ignored", "").split(", ")))


CHAT, RESPONSES, OLLAMA = "/v1/chat/completions", "/v1/responses", "/api/chat"
# body, and what is named of it
WITHOUT_EFFECT: list[tuple[str, dict[str, Any], set[str]]] = [
    (CHAT, {"tools": STRICT}, {"tools[].function.strict"}),
    (CHAT, {"tools": STRICT, "tool_choice": "none"}, set()),
    (CHAT, {"tools": STRICT, "tool_choice": NAMED}, set()),
    (CHAT, {"tools": STRICT, "response_format": {"type": "json_object"}}, set()),
    (CHAT, {"tools": [{"type": "function", "function": WEATHER | {"strict": False}}]}, set()),
    (CHAT, {"functions": [CLOCK | {"strict": True}]}, {"functions[].strict"}),
    (CHAT, {"tools": [{"type": "function", "function": CLOCK | {"defer_loading": True}}]},
     {"tools[].function.defer_loading"}),
    (CHAT, {"stream_options": {"include_usage": True}, "return_progress": True, "timings_per_token": True},
     {"stream_options.include_usage", "return_progress", "timings_per_token"}),
    (CHAT, {"stream_options": {"include_usage": True}, "return_progress": True, "stream": True}, set()),
    (CHAT, {"stream_options": None, "return_progress": False}, set()),
    (RESPONSES, {"tools": [FLAT[0] | {"strict": True}]}, {"tools[].strict"}),
    (RESPONSES, {"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]},
     {"include[reasoning.encrypted_content]"}),
    (RESPONSES, {"input": [
        {"role": "user", "content": "a", "phase": None, "color": "red"},
        {"type": "message", "id": "m", "status": "completed", "role": "assistant", "phase": "final_answer",
         "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": [{"token": "b"}]}]},
        {"role": "user", "content": [{"type": "input_text", "text": "c", "prompt_cache_breakpoint": {}}]},
        {"type": "reasoning", "summary": [], "content": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "i", "name": "weather", "arguments": "{}", "namespace": "n"},
        {"type": "function_call_output", "call_id": "i", "output": "c", "caller": {"type": "direct"}}]},
     {"input[].color", "input[].phase", "input[].content[].logprobs", "input[].content[].prompt_cache_breakpoint",
      "input[].encrypted_content", "input[].namespace", "input[].caller"}),
    (OLLAMA, {"tools": [{"type": "function", "function": CLOCK | {"x": 1}, "items": 1}]},
     {"tools[].items", "tools[].function.x"}),
    (OLLAMA, {"messages": [
        ASK,
        {"role": "assistant", "tool_calls": [{"id": "i", "function": {"name": "f", "arguments": {}, "index": 0}}]},
        {"role": "tool", "tool_name": "clock", "content": "noon"}]},
     {"messages[].tool_calls[].id", "messages[].tool_calls[].function.index", "messages[].tool_name"}),
    ("/v1/messages", {"max_tokens": 9, "tools": [BLOCKS[0] | {"strict": True, "cache_control": {"type": "ephemeral"}}]},
     {"tools[].strict", "tools[].cache_control"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "names"), WITHOUT_EFFECT)
def test_what_has_no_effect_is_named(scripted: Scripted, path: str, body: dict[str, Any], names: set[str]) -> None:
    assert named(ask(scripted, path, body)) == names


def test_calls_as_clients_send_them_back(scripted: Scripted) -> None:
    """OpenAI's own client adds what it parsed, and where a call stood in a stream."""
    function = {"name": "clock", "arguments": "{}", "parsed_arguments": {}}
    call = {"id": "i", "type": "function", "index": 0, "function": function}
    result = {"role": "tool", "tool_call_id": "i", "content": "noon"}
    talk = [ASK, {"role": "assistant", "tool_calls": [call], "parsed": {"a": 1}}, result]
    assert named(ask(scripted, CHAT, {"messages": talk})) == {
        "messages[].parsed",
        "messages[].tool_calls[].index",
        "messages[].tool_calls[].function.parsed_arguments",
    }


def calling(**call: Any) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": "i", "function": {"name": "f"}} | call]}]}


# path, body, and the field that is to blame
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"tools": [TOOLS[0], TOOLS[1] | {"x": 1}]}, "tools[1].x"),
    (CHAT, {"tools": [{"type": "function", "function": WEATHER | {"parmeters": {}}}]}, "tools[0].function.parmeters"),
    (CHAT, {"functions": [WEATHER | {"x": 1}]}, "functions[0].x"),
    (RESPONSES, {"tools": [FLAT[0] | {"x": 1}]}, "tools[0].x"),
    (CHAT, calling(x=1), "messages[1].tool_calls[0].x"),
    (CHAT, calling(function={"name": "f", "x": 1}), "messages[1].tool_calls[0].function.x"),
    (CHAT, calling(type="custom"), "messages[1].tool_calls[0].type"),
    (CHAT, {"tools": TOOLS, "function_call": "auto"}, "function_call"),
    (CHAT, {"function_call": "auto"}, "function_call"),
    (CHAT, {"functions": [CLOCK], "tool_choice": "auto"}, "tool_choice"),
    (CHAT, {"functions": [CLOCK], "parallel_tool_calls": True}, "parallel_tool_calls"),
    (CHAT, {"response_format": FORMAT, "json_schema": SCHEMA}, "json_schema"),
    (CHAT, {"response_format": FORMAT, "guided_json": SCHEMA}, "guided_json"),
    (CHAT, {"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    (CHAT, {"guided_json": SCHEMA, "structured_outputs": {"json": SCHEMA}}, "guided_json"),
    (CHAT, {"guided_choice": ["a"], "structured_outputs": {"choice": ["b"]}}, "guided_choice"),
    (CHAT, {"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs.regex"),
    (RESPONSES, {"include": ["everything"]}, "include[0]"),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
def test_what_can_t_be_meant_is_refused(scripted: Scripted, path: str, body: dict[str, Any], param: str) -> None:
    answer = ask(scripted, path, body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.raw


def test_a_text_format_leaves_a_schema_in_force(scripted: Scripted) -> None:
    assert not named(ask(scripted, CHAT, {"response_format": {"type": "text"}, "json_schema": SCHEMA}))
    assert scripted.script.asked[-1].json_schema is not None


def test_parameters_of_a_kept_response(scripted: Scripted) -> None:
    path = f"/v1/responses/{ask(scripted, RESPONSES, {}).json['id']}"

    def read(query: str) -> Any:
        return scripted.server.call("GET", path + query)

    assert named(read("?stream=false")) == set()
    assert named(read("?include[]=reasoning.encrypted_content&include_obfuscation=false")) == {
        "include[]",
        "include_obfuscation",
    }
    assert named(read("/input_items?limit=1&include=x")) == {"include"}
    for query, param in (("?stream=true", "stream"), ("?starting_after=3", "starting_after")):
        answer = read(query)
        assert (answer.status, answer.error["param"]) == (400, param)


def test_a_header_holds_some_names_of_many(scripted: Scripted) -> None:
    items = [{"role": "user", "content": "a", f"field_{number}": 1} for number in range(500)]
    assert 10 < len(named(ask(scripted, RESPONSES, {"input": items}))) <= 50
