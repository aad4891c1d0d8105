"""What Anthropic's client makes of /v1/messages."""

from __future__ import annotations

import sys
from typing import Any

import anthropic
from anthropic import Anthropic
from checks import FRANCE, QUESTION, WEATHER, run

# the temperature is no argument of the client any more
SETTINGS: dict[str, Any] = {"model": "demo", "max_tokens": 16, "extra_body": {"temperature": 0}}
SETTINGS["messages"] = [{"role": "user", "content": FRANCE}]
TOOLS: dict[str, Any] = {
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 80,
    "tools": [{"name": "weather", "description": "The weather of a city.", "input_schema": WEATHER}],
    "tool_choice": {"type": "tool", "name": "weather"},
}


def check_a_message(client: Anthropic) -> None:
    whole = client.messages.create(**SETTINGS)
    assert "Paris" in whole.content[0].text
    assert whole.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model="demo", messages=SETTINGS["messages"])
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def check_a_stream(client: Anthropic) -> None:
    whole = client.messages.create(**SETTINGS)
    with client.messages.stream(**SETTINGS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


def check_a_tool_round_trip(client: Anthropic) -> None:
    settings = SETTINGS | TOOLS
    used = client.messages.create(**settings)
    assert used.stop_reason == "tool_use"
    (block,) = used.content
    assert block.input["city"] in ("Paris", "Rome")
    with client.messages.stream(**settings) as stream:
        assert stream.get_final_message().content[0].input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "22 degrees"}
    talk = [*TOOLS["messages"], {"role": "assistant", "content": used.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(**(settings | {"messages": talk, "tool_choice": {"type": "auto"}}))
    assert after.content


def check_errors(client: Anthropic) -> None:
    try:
        client.messages.create(**(SETTINGS | {"model": "other"}))
    except anthropic.NotFoundError as error:
        kind = error.body["error"]["type"]
    else:
        raise AssertionError("another model was taken")
    assert kind == "not_found_error"


if __name__ == "__main__":
    url, key = sys.argv[1:]
    run(dict(globals()), Anthropic(base_url=url, api_key=key, max_retries=0, timeout=60))
