"""Tools in a prompt: the published words, where the published server puts them."""

from __future__ import annotations

from typing import Any

import pytest

from qwenlet.chat import Message, render_text
from qwenlet.errors import RequestError
from qwenlet.tools import Tool, Toolbox, ToolChoice, ToolMessage, react_messages, react_replies

WEATHER: dict[str, Any] = {
    "name": "天气",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"城市": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "name": "clock"}]
PROMPT = """Answer the following questions as best you can. You have access to the following APIs:

天气: Call this tool to interact with the 天气 API. What is the 天气 API useful for? Weather of a city. Parameters: {"type": "object", "properties": {"城市": {"type": "string"}}}

clock: Call this tool to interact with the clock API. What is the clock API useful for?  Parameters: {"type": "object", "properties": {}}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [天气, clock]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: """  # noqa: E501


def conversation(*messages: dict[str, Any]) -> list[ToolMessage]:
    return [ToolMessage.of(message) for message in messages]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def called(id: str, name: str = "天气", arguments: str = "{}", content: str | None = None) -> dict[str, Any]:
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def result(id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def test_the_only_question_carries_the_tools():
    messages = react_messages(conversation(user("\nHow warm is it? \n")), Toolbox.of(TOOLS))
    assert messages == [Message("user", PROMPT + "How warm is it?")]


def test_published_names_for_models_and_people():
    tool = Tool.of({"name": "x", "name_for_model": "m", "name_for_human": "H", "description_for_model": "D."})
    text = react_messages(conversation(user("q")), Toolbox((tool,)))[0].content
    assert "m: Call this tool to interact with the H API. What is the H API useful for? D. Parameters:" in text


def test_a_round_trip_stays_in_one_turn():
    talk = conversation(
        user("Warm?"), called("1", arguments='{"城市": "巴黎"}', content="I look."), result("1", "21\n")
    )
    assert render_text(react_messages(talk, Toolbox.of(TOOLS))) == (
        f"<|im_start|>user\n{PROMPT}Warm?<|im_end|>\n<|im_start|>assistant\nThought: I look.\nAction: 天气\n"
        'Action Input: {"城市": "巴黎"}\nObservation: 21\nThought:'
    )


def test_in_a_longer_talk_the_tools_stand_in_the_last_question_but_one():
    talk = conversation(
        user("Warm?"), called("1"), result("1", "21"), {"role": "assistant", "content": "Yes."}, user("Hi"),
        {"role": "assistant", "content": "Hello."}, user("And now?"),
    )  # fmt: skip
    assert render_text(react_messages(talk, Toolbox.of(TOOLS))) == (
        "<|im_start|>user\nWarm?<|im_end|>\n<|im_start|>assistant\nThought: \nAction: 天气\nAction Input: {}\n"
        "Observation: 21\nThought: I now know the final answer.\nFinal Answer: Yes.<|im_end|>\n"
        f"<|im_start|>user\n{PROMPT}Hi<|im_end|>\n<|im_start|>assistant\n"
        "Thought: I now know the final answer.\nFinal Answer: Hello.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_replies_are_learned_behind_the_prompts_they_had():
    """Several questions, with calls and without: before each reply stands what a chat would have asked with."""
    plain = {"role": "assistant", "content": "Yes."}
    talk = conversation(
        {"role": "system", "content": "S"}, user("Warm?"), called("1"), result("1", "21"), plain,
        user("And now?"), called("2"), result("2", "22"), called("3"), result("3", "23"), plain,
        user("Thanks"), plain, user("Bye"), plain,
    )  # fmt: skip
    toolbox = Toolbox.of(TOOLS)
    learned = []
    for messages, first in react_replies(talk, toolbox):
        learned += [index for index, m in enumerate(messages) if m.role == "assistant" and index >= first]
        for index in learned:
            if index >= first:
                assert messages[:index] == react_messages(talk[:index], toolbox)
    assert learned == [index for index, message in enumerate(talk) if message.role == "assistant"]
    assert len(react_replies(talk, Toolbox())) == 1


def test_calls_of_one_message_stand_with_their_own_results():
    two = called("a") | {"tool_calls": [called("a")["tool_calls"][0], called("b", "clock")["tool_calls"][0]]}
    talk = conversation(user("q"), two, result("b", "noon"), result("a", "21"))
    assert render_text(react_messages(talk, Toolbox())).endswith(
        "Thought: \nAction: 天气\nAction Input: {}\nObservation: 21\n"
        "Thought: \nAction: clock\nAction Input: {}\nObservation: noon\nThought:"
    )


def test_legacy_functions():
    call = {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": "{}"}}
    talk = conversation(user("q"), call, {"role": "function", "name": "clock", "content": "noon"})
    assert render_text(react_messages(talk, Toolbox.of(functions=[WEATHER]))).endswith(
        "Thought: \nAction: clock\nAction Input: {}\nObservation: noon\nThought:"
    )


def test_a_thought_kept_apart_comes_back():
    talk = conversation(user("q"), called("1") | {"reasoning_content": "I look."}, result("1", "21"))
    assert "Thought: I look.\nAction: 天气" in render_text(react_messages(talk, Toolbox()))


def test_without_tools_nothing_changes():
    talk = conversation(
        {"role": "developer", "content": " s \n"}, user("\nq "), {"role": "assistant", "content": "a\n"}
    )
    expected = [Message("system", " s \n"), Message("user", "\nq "), Message("assistant", "a\n")]
    assert react_messages(talk, Toolbox()) == expected
    assert react_messages(talk, Toolbox.of(TOOLS, "none")) == expected


def test_only_allowed_tools_are_described():
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOLS[1]]}}
    text = react_messages(conversation(user("q")), Toolbox.of(TOOLS, choice))[0].content
    assert "should be one of [clock]" in text
    assert "天气" not in text


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        ([user("q"), result("1", "x")], "a tool message follows no assistant message with tool calls"),
        ([user("q"), called("1")], "the tool call '1' of 天气 has no result"),
        ([user("q"), called("1"), result("2", "x")], "the tool call '1' of 天气 has no result"),
        ([user("q"), called("1"), result("1", "x"), result("2", "y")], "has the tool_call_id '2', which no call"),
        ([{"role": "system", "content": "s"}], "no user message to describe them in"),
    ],
)
def test_calls_and_results_belong_together(talk: list[dict[str, Any]], said: str):
    with pytest.raises(RequestError, match=said):
        react_messages(conversation(*talk), Toolbox.of(TOOLS))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "content": None}, "has no content"),
        ({"role": "assistant", "content": "x", "tool_calls": 5}, "tool_calls is 5, expected a list"),
        ({"role": "user", "content": [1]}, "expected text"),
        ({"role": "robot", "content": "x"}, "has the role 'robot'"),
        ({"role": [], "content": "x"}, "has the role"),
        (called("1") | {"role": "user", "content": "x"}, "only the assistant calls tools"),
        (user("x") | {"tool_call_id": "1"}, "only a tool message has one"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "a tool call is"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "x", "arguments": {}}}]}, "no text"),
    ],
)
def test_messages_that_make_no_sense(message: dict[str, Any], said: str):
    with pytest.raises(RequestError, match=said):
        ToolMessage.of(message)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": "x"}, "tools is 'x', expected a list"),
        ({"tools": [1]}, "a tool is 1"),
        ({"tools": [{"type": "function", "function": {}}]}, "a tool has no name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "has the name ''"),
        ({"tools": [{"type": "function", "function": {"name": "a\nb"}}]}, "expected one line"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "at most 64"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "the type 'custom'"),
        ({"tools": [WEATHER, WEATHER]}, "declared twice"),
        ({"tools": [{"name": "x", "parameters": []}]}, "expected a JSON schema of an object"),
        ({"tools": [{"name": "x", "parameters": {"type": "string"}}]}, "expected a JSON schema of an object"),
        ({"tools": [{"name": "x", "parameters": {"maximum": float("nan")}}]}, "are not JSON"),
        ({"tools": [{"name": "x", "description": 1}]}, "expected text"),
        ({"tools": [{"name": f"x{i}"} for i in range(129)]}, "at most 128"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice is 'maybe'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names 'x', which is not"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "no", "tools": []}}, "the mode 'no'"),
        ({"tool_choice": "required"}, "no tools are given"),
        ({"tools": TOOLS, "functions": []}, "both tools and functions"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "expected true or false"),
    ],
)
def test_declarations_that_make_no_sense(fields: dict[str, Any], said: str):
    with pytest.raises(RequestError, match=said):
        Toolbox.of(**fields)


def test_choices_in_all_their_forms():
    assert ToolChoice.of(None) == ToolChoice.of("auto") == ToolChoice("auto")
    named = ToolChoice("required", ("clock",))
    assert ToolChoice.of({"type": "function", "function": {"name": "clock"}}) == named
    assert ToolChoice.of({"type": "function", "name": "clock"}) == ToolChoice.of({"name": "clock"}) == named
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    assert ToolChoice.of(allowed) == named
    assert not Toolbox.of(TOOLS, "none")
    assert Toolbox.of(functions=[WEATHER], function_call={"name": "天气"}).legacy
