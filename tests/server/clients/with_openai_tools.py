"""What OpenAI's own client makes of our tools and responses."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai
from checks import FRANCE, QUESTION, WEATHER, run
from openai import OpenAI

FUNCTION = {"name": "weather", "description": "The weather of a city.", "parameters": WEATHER, "strict": True}
FORCED: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": QUESTION}],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "temperature": 0,
    "max_tokens": 80,
}
RESPONSE: dict[str, Any] = {"model": "demo", "input": FRANCE, "temperature": 0, "max_output_tokens": 16}


def check_a_tool_round_trip(client: OpenAI) -> None:
    choice = client.chat.completions.create(**FORCED).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}
    messages = [*FORCED["messages"], choice.message, result]
    after = client.chat.completions.create(**(FORCED | {"messages": messages, "tool_choice": "auto"}))
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


def check_streamed_tools(client: OpenAI) -> None:
    whole = client.chat.completions.create(**FORCED).choices[0].message.tool_calls[0].function
    with client.chat.completions.stream(**FORCED) as stream:
        kinds = {event.type for event in stream}
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert (call.function.name, call.function.arguments) == (whole.name, whole.arguments)
    assert call.function.parsed_arguments["city"] in ("Paris", "Rome")


def check_parsed_messages_go_back(client: OpenAI) -> None:
    """The helpers add what they parsed, and send it back with the message."""
    parsed = client.chat.completions.parse(**FORCED).choices[0].message
    with client.chat.completions.stream(**FORCED) as stream:
        streamed = stream.get_final_completion().choices[0].message
    for message in (parsed, streamed):
        assert message.tool_calls[0].function.parsed_arguments["city"] in ("Paris", "Rome")
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "22 degrees"}
        talk = [*FORCED["messages"], message, result]
        assert client.chat.completions.create(**(FORCED | {"messages": talk, "tool_choice": "auto"})).choices


def check_responses(client: OpenAI) -> None:
    first = client.responses.create(**RESPONSE)
    assert first.status == "completed"
    assert "Paris" in first.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    after = client.responses.create(**(RESPONSE | {"input": "And of Italy?"}), previous_response_id=first.id)
    assert after.usage.input_tokens > first.usage.input_tokens
    assert client.responses.input_items.list(first.id).data[0].content[0].text == FRANCE
    assert client.responses.input_tokens.count(model="demo", input=FRANCE).input_tokens == first.usage.input_tokens
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a deleted response was found")


def check_a_streamed_response(client: OpenAI) -> None:
    whole = client.responses.create(**RESPONSE)
    with client.responses.stream(**RESPONSE) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text


def check_a_response_that_calls(client: OpenAI) -> None:
    settings: dict[str, Any] = RESPONSE | {"max_output_tokens": 80, "input": QUESTION}
    settings |= {"tools": [{"type": "function"} | FUNCTION], "tool_choice": "required"}
    (item,) = client.responses.create(**settings).output
    assert (item.type, item.name) == ("function_call", "weather")
    with client.responses.stream(**settings) as stream:
        pieces = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
        final = stream.get_final_response()
    assert pieces == final.output[0].arguments == item.arguments


if __name__ == "__main__":
    url, key = sys.argv[1:]
    client = OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60, _strict_response_validation=True)
    run(dict(globals()), client)
