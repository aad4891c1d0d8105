"""Calls out of a reply: what models write, well and badly, and that no cut into pieces changes what is read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.tools import Arguments, CallBegun, Reply, ReplyParser, Text, Thought, Toolbox, parse_reply

NAMES = ["get_weather", "get", "北京天气"]
DECLARED = [{"type": "function", "function": {"name": name}} for name in NAMES]
BOX = Toolbox.of(DECLARED)
SEVERAL = Toolbox.of(DECLARED, parallel_tool_calls=True)


def counted() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"call_{next(numbers)}"


def read(text: str, box: Toolbox = BOX, thinking: bool = False) -> tuple[str, str, list[tuple[str, str]]]:
    reply = parse_reply(text, box, thinking=thinking)
    return reply.text, reply.thought, [(call.name, call.arguments) for call in reply.calls]


WEATHER = [("get_weather", '{"city": "Paris"}')]


def test_a_call_as_published():
    text = 'Thought: I look it up.\nAction: get_weather\nAction Input: {"city": "Paris"}\nObservation: sunny'
    assert read(text) == ("", "I look it up.", WEATHER)


def test_a_final_answer_as_published():
    assert read("Thought: I now know the final answer.\nFinal Answer: It is\n\n* sunny\n") == (
        "It is\n\n* sunny\n", "I now know the final answer.", []
    )  # fmt: skip


def test_the_prompt_may_end_within_a_thought():
    assert read(" I know.\nFinal Answer: Sunny.", thinking=True) == ("Sunny.", "I know.", [])
    assert read('\nAction: get_weather\nAction Input: {"city": "Paris"}', thinking=True) == ("", "", WEATHER)


@pytest.mark.parametrize(
    "text", ["", "Hello.", " Hello \n\nworld\n ", "Action films: three of them", "a\nAction: run!\nb"]
)
def test_a_plain_reply_is_text_to_the_letter(text: str):
    assert read(text) == (text, "", [])


@pytest.mark.parametrize(
    "text",
    [
        'Action: get_weather\nAction Input: {"city": "Paris"}',
        'Action:get_weather\nAction Input:{"city": "Paris"}\n',
        '**Action:** `get_weather`\n**Action Input:** {"city": "Paris"}',
        'Action：get_weather\nAction Input：{"city": "Paris"}',
        'Action: [get_weather]\n\nAction_Input: {"city": "Paris"}',
        'Action: Get_Weather.\nActionInput:\n```json\n{"city": "Paris"}\n```\nObservation:',
        'Action: get_weather({"city": "Paris"})',
        'Action: get_weather\n{"city": "Paris"}\nThought: and now?',
        'Action: get_weather Action Input: {"city": "Paris"} That is all.',
    ],
)
def test_slips_are_forgiven(text: str):
    assert read(text) == ("", "", WEATHER)


@pytest.mark.parametrize(
    "end", ["", "\n", "()", "\nAction Input:", "\nAction Inp", "\nObservation: x", "\nAction Input: \n\nObservation:"]
)
def test_a_call_without_arguments_takes_an_empty_object(end: str):
    assert read("Action: get_weather" + end) == ("", "", [("get_weather", "{}")])


def test_arguments_that_are_no_object_stay_as_they_were_written():
    assert read("Action: get\nAction Input: the 3 \n best\nObservation:") == ("", "", [("get", "the 3 \n best")])
    assert read('Action: get\nAction Input: {"a": "x') == ("", "", [("get", '{"a": "x')])


def test_braces_and_markers_inside_strings_end_nothing():
    arguments = '{"q": "} \\" { Observation: \\nAction: get", "n": [{"a": {}}]}'
    assert read(f"Action: get\nAction Input: {arguments}\nObservation:") == ("", "", [("get", arguments)])


def test_an_unknown_tool_is_text():
    text = "Thought: none fits.\nAction: None\nAction Input: None"
    assert read(text)[2] == []
    assert "Action: None" in "".join(read(text)[:2])


def test_a_reply_that_only_thinks_is_its_own_answer():
    assert read("Thought: Paris is the capital.") == ("Paris is the capital.", "Paris is the capital.", [])


def test_several_calls_where_they_are_allowed():
    text = (
        'Thought: two.\nAction: get_weather\nAction Input: {"city": "Paris"}\nThought: more.\n'
        'Action: 北京天气\nAction Input: {}\nObservation: lost\nAction: get\nAction Input: {"never": 1}'
    )
    assert read(text) == ("", "two.", WEATHER)
    assert read(text, SEVERAL) == ("", "two.\nmore.", [*WEATHER, ("北京天气", "{}")])


def test_after_one_call_nothing_more_is_wanted():
    parser = ReplyParser(BOX)
    parser.push("Action: get\nAction Input: {")
    assert not parser.done
    parser.push("} and")
    assert parser.done
    assert parser.calls == 1
    assert parser.push("\nAction: get_weather") == []


def test_a_reply_cut_for_want_of_tokens_makes_no_call_of_a_name():
    parser = ReplyParser(BOX)
    events = [*parser.push("Action: get_weather\nAction In"), *parser.finish(cut=True)]
    assert Reply.from_events(events) == Reply("Action: get_weather\nAction In", "", ())


def test_what_can_be_no_marker_leaves_at_once():
    parser = ReplyParser(BOX, make_id=counted())
    assert parser.push("Hello") == [Text("Hello")]
    assert parser.push(" wor") == [Text(" wor")]
    assert parser.push("ld\nThou") == [Text("ld")]
    assert parser.push("ght: so") == [Thought("so")]
    assert parser.push("\nAction: get") == []
    assert parser.push("\nAction Input: {") == [CallBegun(0, "call_0", "get"), Arguments(0, "{")]
    assert parser.push('"a"') == [Arguments(0, '"a"')]


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *NAMES, "Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:", "Actio", "\nThought: ",
                "Action: get\nAction Input: ", "\n", " ", "**", "：", "```json\n", "```", '{"a": "b"}', "{", "}",
                '"', "\\", "(", ")",
            ]
        ),
        st.text(max_size=4),
    ),
    max_size=14,
)  # fmt: skip


def joined(events: list[object]) -> list[object]:
    """Events with neighbours of one kind made one."""
    whole: list[object] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, Arguments) and isinstance(last, Arguments) and event.index == last.index:
            whole[-1] = Arguments(event.index, last.text + event.text)
        elif isinstance(event, Text | Thought) and type(event) is type(last):
            whole[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        else:
            whole.append(event)
    return whole


@given(pieces=PIECES, cuts=st.lists(st.integers(1, 7), max_size=60), several=st.booleans(), thinking=st.booleans())
def test_no_cut_changes_what_is_read(pieces: list[str], cuts: list[int], several: bool, thinking: bool):
    text, box = "".join(pieces), SEVERAL if several else BOX
    whole = ReplyParser(box, thinking=thinking, make_id=counted())
    expected = joined([*whole.push(text), *whole.finish()])
    parser, events, place = ReplyParser(box, thinking=thinking, make_id=counted()), [], 0
    for size in [*cuts, len(text)]:
        events += parser.push(text[place : place + size])
        place += size
    events += parser.finish()
    assert joined(events) == expected
    single = ReplyParser(box, thinking=thinking, make_id=counted())
    assert joined([*(e for character in text for e in single.push(character)), *single.finish()]) == expected


@given(text=st.text(max_size=60).filter(lambda text: ":" not in text and "：" not in text))
def test_nothing_is_lost(text: str):
    """A text without markers is text to the letter, and a thought's words all arrive."""
    assert read(text)[0] == text
    thought = read(f"Thought: {text}\nAction: get\nAction Input: {{}}")[1]
    assert thought == text.strip(" \t\r\n")


@pytest.mark.parametrize(
    "text",
    ["\n" * 30_000, " " * 30_000, "Action: get" * 3_000, "Action: get\nAction Input: " + "`" * 30_000, "*" * 30_000],
)
def test_a_hostile_reply_takes_no_longer_than_its_length(text: str):
    began = time.perf_counter()
    parser = ReplyParser(BOX)
    for place in range(0, len(text), 10):
        parser.push(text[place : place + 10])
    parser.finish()
    assert time.perf_counter() - began < 5
