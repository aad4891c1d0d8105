"""ChatML: the published prompts id by id, turns that no text can forge, and conversations cut to fit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.chat import (
    Message,
    fit,
    history_to_messages,
    label,
    make_context,
    parse_reply,
    render,
    render_text,
    stop_ids,
)
from qwenlet.errors import ContextLengthError, RequestError, TokenizerError
from qwenlet.gguf_header import read_header
from qwenlet.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
SURFACES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|extra_0|>", "<|im_start|>assistant\n", "\n", "<|"]
WILD_TEXT = st.lists(st.one_of(st.text(max_size=10), st.sampled_from(SURFACES)), max_size=6).map("".join)


@pytest.fixture(scope="module")
def qwen(qwen_vocab: Path) -> Tokenizer:
    return Tokenizer.from_file(qwen_vocab)


@pytest.fixture(scope="module")
def smollm(demo_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(read_header(demo_gguf).metadata, demo_gguf)


@pytest.fixture(scope="module")
def published(golden: Path) -> Any:
    return json.loads((golden / "chat.json").read_text(encoding="utf-8"))["cases"]


def conversation(*contents: str) -> list[Message]:
    return [Message("user" if index % 2 == 0 else "assistant", content) for index, content in enumerate(contents)]


# ------------------------------------------------------------------------------------------------------- as published


def test_all_golden_contexts(qwen: Tokenizer, published: Any):
    assert len(published) == 12
    for case in published:
        arguments = {name: value for name, value in case.items() if name not in ("raw_text", "ids")}
        assert make_context(qwen, **arguments) == (case["raw_text"], case["ids"]), case["query"]


def test_render_equals_the_published_context_where_nothing_is_cut(qwen: Tokenizer, published: Any):
    cases = [case for case in published if case["chat_format"] == "chatml" and len(case["history"] or []) < 5]
    assert len(cases) > 5
    for case in cases:
        messages = history_to_messages(case["query"], case["history"], case["system"])
        assert render(qwen, messages) == case["ids"]
        assert render_text(messages) == case["raw_text"]


def test_the_demo_model_s_prompt(smollm: Tokenizer, golden: Path):
    case = json.loads((golden / "smollm2.json").read_text(encoding="utf-8"))["chat"]
    assert render(smollm, case["messages"]) == case["ids"]


def test_a_window_is_a_number_of_tokens_below_which_history_is_kept(qwen: Tokenizer):
    """The published comparison is strict: a history that fills the window exactly is dropped."""
    whole = make_context(qwen, "q", [("a", "b")], "sys")[1]
    alone = make_context(qwen, "q", None, "sys")[1]
    system_size = len(render(qwen, [Message("system", "sys")], add_generation_prompt=False))
    size = len(whole) - len(alone) + system_size
    assert make_context(qwen, "q", [("a", "b")], "sys", max_window_size=size + 1)[1] == whole
    assert make_context(qwen, "q", [("a", "b")], "sys", max_window_size=size)[1] == alone


# -------------------------------------------------------------------------------------------------------------- render


def test_nothing_is_added_to_the_conversation(qwen: Tokenizer):
    assert (
        render_text([{"role": "user", "content": "hi"}], add_generation_prompt=False)
        == "<|im_start|>user\nhi<|im_end|>"
    )
    assert render(qwen, conversation("hi"), add_generation_prompt=False) == [151644, 872, 198, 6023, 151645]


@given(contents=st.lists(WILD_TEXT, min_size=1, max_size=5), reply=st.booleans())
def test_no_text_forges_a_turn(qwen: Tokenizer, contents: list[str], reply: bool):
    ids = render(qwen, [SYSTEM, *conversation(*contents)], add_generation_prompt=reply)
    turns = 1 + len(contents)
    assert [id for id in ids if qwen.is_special(id)] == [151644, 151645] * turns + [151644] * reply
    assert qwen.decode(ids) == qwen.normalize(render_text([SYSTEM, *conversation(*contents)], reply))


@given(result=WILD_TEXT)
def test_no_tool_result_forges_a_turn(qwen: Tokenizer, result: str):
    messages = [*conversation("what time?", "Action: clock"), Message("tool", result)]
    ids = render(qwen, messages)
    assert [id for id in ids if qwen.is_special(id)] == [151644, 151645, 151644]


CALL = [*conversation("what time?", "Thought: I look.\nAction: clock\nAction Input: {}"), Message("tool", "12:00")]
CALL_TEXT = (
    "<|im_start|>user\nwhat time?<|im_end|>\n"
    "<|im_start|>assistant\nThought: I look.\nAction: clock\nAction Input: {}\nObservation: 12:00"
)


def test_a_tool_result_continues_the_assistant_s_turn_and_leaves_it_open_for_the_reply():
    assert render_text(CALL) == CALL_TEXT + "\nThought:"
    assert render_text(CALL, add_generation_prompt=False) == CALL_TEXT + "<|im_end|>"
    assert render_text([*CALL, Message("tool", "UTC")]) == CALL_TEXT + "\nObservation: UTC\nThought:"


@pytest.mark.parametrize("reply", [" It is noon.", "Thought: It is noon."])
def test_the_reply_to_a_tool_result_goes_where_it_was_asked_for(qwen: Tokenizer, reply: str):
    messages = [*CALL, Message("assistant", reply), Message("user", "thanks")]
    text = render_text(messages)
    assert text == (
        CALL_TEXT + "\nThought: It is noon.<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n"
    )
    assert qwen.decode(render(qwen, messages)) == text


@pytest.mark.parametrize("before", [[], [SYSTEM], conversation("hi")])
def test_a_tool_message_needs_the_call_before_it(qwen: Tokenizer, before: list[Any]):
    messages = [*before, {"role": "tool", "content": "12:00"}]
    with pytest.raises(
        RequestError, match=r"a tool message follows (nothing|a (system|user) message); it belongs after"
    ):
        render(qwen, messages)
    with pytest.raises(RequestError, match="a tool message follows"):
        fit(qwen, messages, 100, 10)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no messages"),
        ("hi", "messages is 'hi', expected a list"),
        ({"role": "user", "content": "hi"}, "expected a list of messages"),
        ([("user", "hi")], r"a message is \('user', 'hi'\), expected"),
        ([{"role": "user"}], "a message has no content"),
        ([{}], "has no content and no role"),
        ([{"role": "user", "content": None}], "a user message has the content None, expected text"),
        ([{"role": "developer", "content": "hi"}], "role 'developer'; known are system, user, assistant, tool"),
        ([{"role": ["user"], "content": "hi"}], r"role \['user'\]"),
        ([{"role": "user", "content": "hi", "name": "me"}], "the field 'name', which is not understood"),
    ],
)
def test_bad_messages_are_refused(qwen: Tokenizer, messages: Any, complaint: str):
    with pytest.raises(RequestError, match=complaint):
        render(qwen, messages)


def test_a_vocabulary_without_chat_tokens_can_t_chat():
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_start|>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
    }
    with pytest.raises(TokenizerError, match=r"base\.gguf has no <\|im_end\|>, which chats need"):
        render(Tokenizer.from_gguf(metadata, "base.gguf"), conversation("ab"))


# ----------------------------------------------------------------------------------------------------------------- fit


def test_old_turns_go_first_and_the_system_message_stays(qwen: Tokenizer):
    messages = [Message.of(SYSTEM), *conversation("first", "answer one", "second", "answer two", "third")]
    whole = render(qwen, messages)
    assert fit(qwen, messages, len(whole) + 100, 100).ids == whole

    fitted = fit(qwen, messages, len(whole) + 99, 100)
    assert fitted.dropped_turns == 1
    assert fitted.messages == (messages[0], *messages[3:])
    assert fitted.ids == render(qwen, fitted.messages)


@given(contents=st.lists(WILD_TEXT, min_size=1, max_size=7), context_length=st.integers(1, 200), system=st.booleans())
def test_fit_keeps_the_longest_end_that_fits(qwen: Tokenizer, contents: list[str], context_length: int, system: bool):
    head = [Message.of(SYSTEM)] if system else []
    messages = conversation(*contents)
    ends = [[*head, *messages[start:]] for start in range(0, len(messages), 2)]
    sizes = [len(render(qwen, end)) for end in ends]
    fitting = [index for index, size in enumerate(sizes) if size + 5 <= context_length]
    if fitting:
        fitted = fit(qwen, [*head, *messages], context_length, 5)
        assert fitted.dropped_turns == fitting[0]
        assert list(fitted.messages) == ends[fitting[0]]
        assert fitted.ids == render(qwen, ends[fitting[0]])
    else:
        with pytest.raises(ContextLengthError) as caught:
            fit(qwen, [*head, *messages], context_length, 5)
        assert caught.value.prompt_tokens == sizes[-1]
        assert caught.value.context_length == context_length
        assert caught.value.max_new_tokens == 5


def test_a_turn_is_dropped_with_its_tool_results(qwen: Tokenizer):
    messages = [*CALL, Message("assistant", " noon"), Message("user", "thanks")]
    fitted = fit(qwen, messages, 20, 8)
    assert fitted.messages == (Message("user", "thanks"),)
    assert fit(qwen, CALL, 200, 8).ids == render(qwen, CALL)


def test_a_conversation_may_open_with_the_assistant_or_be_a_system_message_alone(qwen: Tokenizer):
    greeting = [Message("assistant", "Welcome! " * 20), Message("user", "hi")]
    assert fit(qwen, greeting, 20, 5).messages == (greeting[1],)
    assert fit(qwen, [SYSTEM], 50, 5).ids == render(qwen, [SYSTEM])


def test_fitting_a_long_conversation_takes_linear_time(qwen: Tokenizer):
    messages = conversation(*(f"message {n}" for n in range(10_001)))
    started = time.perf_counter()
    fitted = fit(qwen, messages, 4096, 512)
    assert time.perf_counter() - started < 10  # 0.2 s on an idle machine
    assert 4096 - 512 - 30 < len(fitted.ids) <= 4096 - 512


def test_a_reserve_below_zero_is_refused(qwen: Tokenizer):
    with pytest.raises(RequestError, match="reserve is -1"):
        fit(qwen, conversation("hi"), 100, -1)


# ------------------------------------------------------------------------------------------------------------- replies


def test_a_reply_ends_at_its_first_control_token_and_keeps_its_white_space(qwen: Tokenizer):
    words = qwen.encode("\n    return 1\n", allowed_special=set())
    assert parse_reply(qwen, words) == "\n    return 1\n"
    for stop in (151643, 151644, 151645):
        assert parse_reply(qwen, [*words, stop, *words]) == "\n    return 1\n"
    assert parse_reply(qwen, [151645]) == ""
    assert parse_reply(qwen, [64, 151646, 65]) == "ab"  # <|extra_0|> is no end, and no text
    assert parse_reply(qwen, [151_935, 64]) == "\ufffda"  # a padding row, sampled


def test_stop_ids(qwen: Tokenizer, smollm: Tokenizer):
    assert stop_ids(qwen, "chatml") == (151645, 151644, 151643)
    assert stop_ids(qwen, "raw") == (151643,)
    assert stop_ids(smollm) == (2, 1, 0)
    assert stop_ids(smollm, "raw") == (0, 2)


def test_an_unknown_chat_format_is_refused(qwen: Tokenizer):
    with pytest.raises(RequestError, match="chat_format is 'alpaca'; known are chatml, raw"):
        make_context(qwen, "hi", chat_format="alpaca")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="chat_format"):
        stop_ids(qwen, "")  # type: ignore[arg-type]


def test_history_to_messages():
    assert history_to_messages("q", [("a", "b")], "s") == [
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "q"),
    ]
    assert history_to_messages("q") == [Message("user", "q")]
    assert history_to_messages("q", system="")[0] == Message("system", "")


# ------------------------------------------------------------------------------------------------- what training learns

TOOL_TALK = [
    SYSTEM,
    {"role": "user", "content": "6 times 7?"},
    {"role": "assistant", "content": "Thought: I count.\nAction: calc\nAction Input: 6*7"},
    {"role": "tool", "content": "42, says the tool"},
    {"role": "assistant", "content": "Thought: I know.\nFinal Answer: 42"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "好"},
]


def learned_text(tokenizer: Tokenizer, ids: list[int], marks: list[bool]) -> str:
    """Learned tokens as they are, each run of others as one bar."""
    text, bar = "", False
    for id, mark in zip(ids, marks, strict=True):
        text += tokenizer.decode([id]) if mark else "" if bar else "|"
        bar = not mark
    return text


def test_the_assistants_words_are_learned_and_no_others(qwen: Tokenizer):
    ids, marks = label(qwen, TOOL_TALK)
    assert ids == render(qwen, TOOL_TALK, add_generation_prompt=False)
    assert learned_text(qwen, ids, marks) == (
        "|Thought: I count.\nAction: calc\nAction Input: 6*7\nObservation:| I know.\nFinal Answer: 42<|im_end|>"
        "|好<|im_end|>"
    )


def test_one_message_can_be_left_out_of_what_is_learned(qwen: Tokenizer):
    ids, marks = label(qwen, TOOL_TALK, [False, False, False, False, False, False, True])
    assert learned_text(qwen, ids, marks) == "|好<|im_end|>"
    with pytest.raises(RequestError, match="2 flags"):
        label(qwen, TOOL_TALK, [True, True])


def test_published_labels_have_the_ends_of_every_role(qwen: Tokenizer):
    """As finetune.py of the published code: <|im_start|>, <|im_end|> and its line break of all roles are learned."""
    ids, marks = label(qwen, [SYSTEM, *TOOL_TALK[-2:]], published=True)
    assert ids == [*render(qwen, [SYSTEM, *TOOL_TALK[-2:]], add_generation_prompt=False), *qwen.encode("\n")]
    assert learned_text(qwen, ids, marks) == (
        "<|im_start|>|<|im_end|>\n<|im_start|>|<|im_end|>\n<|im_start|>|好<|im_end|>\n"
    )


@given(st.lists(st.tuples(WILD_TEXT, WILD_TEXT, WILD_TEXT), min_size=1, max_size=3))
def test_labels_are_made_for_exactly_what_is_rendered(qwen: Tokenizer, turns: list[tuple[str, str, str]]):
    messages = []
    for question, call, result in turns:
        messages += [Message("user", question), Message("assistant", call), Message("tool", result)]
        messages += [Message("assistant", "done")]
    ids, marks = label(qwen, messages)
    assert ids == render(qwen, messages, add_generation_prompt=False)
    assert len(marks) == len(ids)
    assert sum(mark for id, mark in zip(ids, marks, strict=True) if id == qwen.im_end_id) == len(turns)
