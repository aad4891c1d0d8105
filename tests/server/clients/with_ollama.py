"""What Ollama's client makes of /api."""

from __future__ import annotations

import sys
from typing import Any

import ollama
from checks import FRANCE, QUESTION, WEATHER, run
from ollama import Client

ASK: list[Any] = [{"role": "user", "content": FRANCE}]
GREEDY = {"temperature": 0, "num_predict": 16}


def check_chat(client: Client) -> None:
    whole = client.chat("demo", ASK, options=GREEDY)
    assert "Paris" in whole.message.content
    assert whole.done_reason == "stop"
    pieces = list(client.chat("demo", ASK, options=GREEDY, stream=True))
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert pieces[-1].eval_count == whole.eval_count


def check_generate(client: Client) -> None:
    assert "Paris" in client.generate("demo", FRANCE, options=GREEDY).response


def check_tool_results(client: Client) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    talk = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "22 degrees"},
    ]
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": WEATHER}}
    assert client.chat("demo", talk, tools=[tool], options=GREEDY).done


def check_the_model(client: Client) -> None:
    assert client.list().models[0].model == "demo"
    assert client.ps().models[0].model == "demo"
    assert "tools" in client.show("demo").capabilities


def check_errors(client: Client) -> None:
    try:
        client.chat("other", ASK)
    except ollama.ResponseError as error:
        told = error
    else:
        raise AssertionError("another model was taken")
    assert told.status_code == 404
    assert "not loaded" in told.error


if __name__ == "__main__":
    url, key = sys.argv[1:]
    run(dict(globals()), Client(host=url, headers={"authorization": f"Bearer {key}"}))
