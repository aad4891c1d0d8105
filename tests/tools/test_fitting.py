"""A conversation with tools is cut so that tools, results and reply all fit; against a search that tries every cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwenlet
from qwenlet.chat import render
from qwenlet.errors import ContextLengthError, RequestError
from qwenlet.tokenizer import Tokenizer
from qwenlet.tools import Call, Tool, Toolbox, ToolMessage, fit, parse_reply, react_messages

SYSTEM = ToolMessage("system", "You are a helpful assistant.")
CLOCK = Tool("clock", "The time in a zone.", {"type": "object", "properties": {"zone": {"type": "string"}}})
TOOLBOX = Toolbox((CLOCK,))


@pytest.fixture(scope="module")
def qwen(qwen_vocab: Path) -> Tokenizer:
    return Tokenizer.from_file(qwen_vocab)


def exchange(question: str, answer: str, result: str | None = None) -> list[ToolMessage]:
    called = [
        ToolMessage("assistant", calls=(Call("call_1", "clock", '{"zone": "UTC"}'),), thought="I look."),
        ToolMessage("tool", result or "", call_id="call_1"),
    ]
    return [ToolMessage("user", question), *(called if result is not None else []), ToolMessage("assistant", answer)]


words = st.text(alphabet="ab 天\n", max_size=40)
talks = st.lists(st.tuples(words, words, st.none() | words), min_size=1, max_size=5)


@given(talks, st.integers(150, 450), st.booleans(), st.booleans())
def test_the_longest_end_that_fits_is_kept(qwen: Tokenizer, talk: Any, room: int, tools: bool, asked: bool):
    turns = [exchange(*one) for one in talk]
    turns[-1] = turns[-1][:-1] if asked else turns[-1]
    toolbox = TOOLBOX if tools else Toolbox()
    prompts = [
        render(qwen, react_messages([SYSTEM, *(m for turn in turns[cut:] for m in turn)], toolbox))
        for cut in range(len(turns))
    ]
    good = [cut for cut, ids in enumerate(prompts) if len(ids) + 20 <= room]
    told = [SYSTEM, *(m for turn in turns for m in turn)]
    if not good:
        with pytest.raises(ContextLengthError):
            fit(qwen, told, toolbox, room, 20)
        return
    fitted = fit(qwen, told, toolbox, room, 20)
    assert (fitted.dropped_turns, fitted.ids) == (good[0], prompts[good[0]])


def test_the_tools_are_described_in_what_is_kept(qwen: Tokenizer):
    long = "word " * 300
    told = [SYSTEM, *exchange(long, "a"), *exchange(long, "b", "noon"), ToolMessage("user", "And now?")]
    whole = fit(qwen, told, TOOLBOX, 4096, 100)
    assert whole.dropped_turns == 0
    fitted = fit(qwen, told, TOOLBOX, 500, 100)
    assert fitted.dropped_turns == 2
    assert "clock: Call this tool" in fitted.messages[1].content
    assert len(fitted.ids) + 100 <= 500
    with pytest.raises(ContextLengthError, match="the context holds 200"):
        fit(qwen, told, TOOLBOX, 200, 100)


# ------------------------------------------------------------------------------------------------------- LLM.reply


@pytest.fixture(scope="module")
def llm(demo_gguf: Path) -> Iterator[qwenlet.LLM]:
    with qwenlet.load(str(demo_gguf), dtype="fp32", device="cpu") as llm:
        yield llm


def test_the_model_is_given_the_published_prompt_and_stops_before_a_result(llm: qwenlet.LLM):
    question = {"role": "user", "content": "What time is it?"}
    params = qwenlet.SamplingParams(temperature=0, max_new_tokens=3)
    *_, last = llm.reply([question], params, TOOLBOX)
    plain = react_messages([ToolMessage("user", "What time is it?")], TOOLBOX)
    assert last.prompt_tokens == len(render(llm.tokenizer, plain))
    required = replace(TOOLBOX, choice=replace(TOOLBOX.choice, mode="required"))
    text = "".join(chunk.text for chunk in llm.reply([question], replace(params, max_new_tokens=80), required))
    assert "Observation" not in text
    assert [call.name for call in parse_reply(text, required).calls] == ["clock"]


def test_calls_of_earlier_replies_are_told_without_tools_too(llm: qwenlet.LLM):
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    told = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "c"},
    ]
    params = qwenlet.SamplingParams(temperature=0, max_new_tokens=3)
    *_, last = llm.reply(told, params)
    plain = react_messages([ToolMessage.of(message) for message in told], Toolbox())
    assert last.prompt_tokens == len(render(llm.tokenizer, plain))
    with pytest.raises(RequestError, match="the field 'name'"):
        llm.reply([told[0], told[1] | {"name": "x"}, told[2]], params)
