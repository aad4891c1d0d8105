"""/v1/responses through the real server: objects, events, what is kept, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.conftest import Server
from server.test_tools import CLOCK, WEATHER

FRANCE = "What is the capital of France?"
FLAT = [{"type": "function", **WEATHER}, {"type": "function", **CLOCK}]
NAMED = {"type": "function", "name": "weather"}


def respond(server: Server, given: Any = FRANCE, **fields: Any) -> Any:
    body = {"input": given, "temperature": 0, "max_output_tokens": 24} | fields
    return server.call("POST", "/v1/responses", body)


def events(answer: Any) -> list[Any]:
    """The stream's data, whose event names agree with their types, numbered from 0."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = [part for part in answer.raw.decode().split("\n\n") if part and not part.startswith(":")]
    found = []
    for part in parts:
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_a_response(server: Server) -> None:
    answer = respond(server, metadata={"a": "b"})
    assert answer.status == 200, answer.raw
    whole = answer.json
    assert whole["id"].startswith("resp_")
    assert (whole["object"], whole["status"], whole["error"]) == ("response", "completed", None)
    (item,) = whole["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert "Paris" in item["content"][0]["text"]
    assert whole["metadata"] == {"a": "b"}
    counts = whole["usage"]
    assert counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"]
    tokens = server.call("POST", "/v1/responses/input_tokens", {"input": FRANCE}).json
    assert tokens == {"object": "response.input_tokens", "input_tokens": counts["input_tokens"]}


def test_the_events_add_up_to_the_response(server: Server) -> None:
    whole = respond(server).json
    told = events(respond(server, stream=True))
    kinds = [event["type"] for event in told]
    deltas = [event for event in told if event["type"] == "response.output_text.delta"]
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(event["delta"] for event in deltas) == text
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert len(deltas) > 1
    assert told[0]["response"]["output"] == []
    assert told[2]["item"]["content"] == []
    last = told[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert {event["item_id"] for event in deltas} == {last["output"][0]["id"]}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert server.call("GET", f"/v1/responses/{last['id']}").json == last


def test_a_cut_response_is_incomplete(server: Server) -> None:
    whole = respond(server, max_output_tokens=2).json
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert events(respond(server, max_output_tokens=2, stream=True))[-1]["type"] == "response.incomplete"


def test_a_tool_is_called_and_its_result_answered(server: Server) -> None:
    fields = {"tools": FLAT, "tool_choice": NAMED, "max_output_tokens": 120}
    whole = respond(server, "What is the weather in Paris?", **fields).json
    (item,) = whole["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "completed")
    assert set(json.loads(item["arguments"])) == {"city", "days"}
    assert whole["tools"][0]["name"] == "weather"
    assert whole["tool_choice"] == NAMED
    told = events(respond(server, "What is the weather in Paris?", stream=True, **fields))
    pieces = [e for e in told if e["type"] == "response.function_call_arguments.delta"]
    (done,) = [e for e in told if e["type"] == "response.function_call_arguments.done"]
    assert "".join(e["delta"] for e in pieces) == done["arguments"] == item["arguments"]
    (added,) = [e for e in told if e["type"] == "response.output_item.added"]
    assert (added["item"]["name"], added["item"]["arguments"]) == ("weather", "")
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "22 degrees"}
    after = respond(server, [result], previous_response_id=whole["id"], tools=FLAT)
    assert after.status == 200, after.raw
    assert after.json["previous_response_id"] == whole["id"]
    assert after.json["usage"]["input_tokens"] > whole["usage"]["input_tokens"] + 10


def test_a_response_goes_on_from_an_earlier_one(server: Server) -> None:
    first = respond(server, instructions="Be brief.").json
    second = respond(server, "And of Italy?", previous_response_id=first["id"]).json
    text = first["output"][0]["content"][0]["text"]
    same = [
        {"role": "user", "content": FRANCE},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert second["output"][0]["content"] == respond(server, same, store=False).json["output"][0]["content"]
    assert second["usage"]["input_tokens"] == respond(server, same, store=False).json["usage"]["input_tokens"]
    items = server.call("GET", f"/v1/responses/{second['id']}/input_items").json
    assert [part["text"] for item in items["data"] for part in item["content"]] == ["And of Italy?"]
    assert items["has_more"] is False


def test_input_items_come_in_pages(server: Server) -> None:
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    path = f"/v1/responses/{respond(server, talk, max_output_tokens=1).json['id']}/input_items"
    first = server.call("GET", f"{path}?order=asc&limit=2").json
    assert [item["role"] for item in first["data"]] == ["user", "assistant"]
    assert first["has_more"] is True
    rest = server.call("GET", f"{path}?order=asc&limit=2&after={first['last_id']}").json
    assert [item["role"] for item in rest["data"]] == ["user"]


def test_what_is_deleted_or_not_kept_is_gone(server: Server) -> None:
    id = respond(server, max_output_tokens=1).json["id"]
    assert server.call("POST", f"/v1/responses/{id}/cancel").error["message"].startswith(f"the response {id}")
    assert server.call("DELETE", f"/v1/responses/{id}").json == {"id": id, "object": "response", "deleted": True}
    gone = respond(server, max_output_tokens=1, store=False).json["id"]
    for missing in (id, gone):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
            answer = server.call(method, f"/v1/responses/{missing}{path}")
            assert (answer.status, answer.error["code"]) == (404, "response_not_found")
        answer = respond(server, previous_response_id=missing)
        assert (answer.status, answer.error["code"]) == (400, "previous_response_not_found")


def test_a_schema_holds_the_text(server: Server) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    wanted = {"format": {"type": "json_schema", "name": "place", "schema": schema, "strict": True}}
    whole = respond(server, text=wanted, max_output_tokens=40).json
    assert json.loads(whole["output"][0]["content"][0]["text"])["city"] in ("Paris", "Rome")
    assert whole["text"]["format"]["schema"] == schema


def test_log_probabilities_are_asked_for(server: Server) -> None:
    whole = respond(server, top_logprobs=1, include=["message.output_text.logprobs"], max_output_tokens=3).json
    part = whole["output"][0]["content"][0]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    told = events(respond(server, top_logprobs=1, max_output_tokens=3, stream=True))
    streamed = [entry for e in told if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in part["logprobs"]]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "empty input": ({"input": []}, "input"),
    "an unknown field": ({"inptu": 1}, "inptu"),
    "a role": ({"input": [{"role": "wizard", "content": "x"}]}, "input[0]"),
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    "no content": ({"input": [{"role": "user"}]}, "input[0].content"),
    "a reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    "a call without a name": ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name"),
    "background": ({"background": True}, "background"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "a built-in tool": ({"tools": [{"type": "web_search"}]}, "tools"),
    "no schema": ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(server: Server, name: str) -> None:
    fields, param = BAD[name]
    answer = respond(server, **fields)
    assert (answer.status, answer.error["param"]) == (400, param), answer.raw
