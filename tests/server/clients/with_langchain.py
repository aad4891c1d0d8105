"""What LangChain's ChatOpenAI makes of our tools."""

from __future__ import annotations

import sys

from checks import QUESTION, WEATHER, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}}


def check_a_tool_round_trip(model: ChatOpenAI) -> None:
    talk = [HumanMessage(QUESTION)]
    called = model.bind_tools([TOOL], tool_choice="weather").invoke(talk)
    (call,) = called.tool_calls
    assert call["args"]["city"] in ("Paris", "Rome")
    after = model.bind_tools([TOOL]).invoke([*talk, called, ToolMessage("22 degrees", tool_call_id=call["id"])])
    assert after.response_metadata["model_name"] == "demo"


def check_a_streamed_call(model: ChatOpenAI) -> None:
    whole = None
    for chunk in model.bind_tools([TOOL], tool_choice="weather").stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"]["city"] in ("Paris", "Rome")


if __name__ == "__main__":
    url, key = sys.argv[1:]
    settings = {"model": "demo", "temperature": 0, "max_tokens": 80, "max_retries": 0}
    run(dict(globals()), ChatOpenAI(base_url=url + "/v1", api_key=key, **settings))
