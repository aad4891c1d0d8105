"""Files of /save: written whole, read with suspicion; and a stored conversation that goes on on the terminal."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.cli.conversation import Exchange, State
from qwenlet.cli.saved import read, state_of, tree_of, write
from qwenlet.config import SamplingParams
from qwenlet.errors import QwenletError, RequestError
from qwenlet.store import Conversation, StoredMessage, Tree

CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
STEPS = (
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00", "tool_call_id": "call_1"},
)


def state(*exchanges: Exchange, **params: Any) -> State:
    return State("Be brief.", SamplingParams(**params), exchanges)


def loaded(path: Any) -> State:
    return state_of(read(path))[0]


def test_what_is_saved_is_loaded(tmp_path):
    file = tmp_path / "talk.json"
    before = state(
        Exchange("你好", "hi\n```\n"),
        Exchange("go on", "half a", "cancelled"),
        Exchange("time?", "Noon.", steps=STEPS),
        seed=3,
        stop=("a", "b"),
    )
    write(file, "demo", before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read(file).conversation.model == "demo"
    assert loaded(file) == before


def test_saving_again_overwrites_a_conversation_and_nothing_else(tmp_path):
    file, precious = tmp_path / "talk.json", tmp_path / "notes.txt"
    write(file, "demo", state())
    write(file, "demo", state(Exchange("a", "b")))
    assert loaded(file).exchanges == (Exchange("a", "b"),)
    precious.write_text("my work")
    with pytest.raises(RequestError, match="not a saved conversation"):
        write(precious, "demo", state())
    assert precious.read_text() == "my work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "talk.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "talk.json"
    write(file, "demo", state(Exchange("old", "old")))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RequestError, match="No space left"):
        write(file, "demo", state())
    assert loaded(file).exchanges == (Exchange("old", "old"),)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_saving_where_there_is_no_folder(tmp_path):
    with pytest.raises(RequestError, match=r"can't write into .*nowhere: No such file"):
        write(tmp_path / "nowhere" / "talk.json", "demo", state())


OLD = {
    "version": 1,
    "model": "demo",
    "system": "",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "finish_reason": "length"}],
    "params": {"temperature": 0.5},
}


def test_files_of_earlier_versions_are_read(tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(OLD))
    assert loaded(file) == State("", SamplingParams(temperature=0.5), (Exchange("a", "b", "length"),))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "version is 2, expected 1"),
        ({"system": 5}, "system is 5, expected text"),
        ({"messages": "hi"}, 'messages is "hi", expected a list'),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]\.role is \"robot\""),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\]\.content is 1, expected a list"),
        ({"params": {"temprature": 1}}, "params has 'temprature'"),
        ({"params": {"temperature": -1}}, "params: temperature is -1"),
        ({"params": {"stop_token_ids": {}}}, "params: stop_token_ids is {}"),
        ({"params": {"n": 3}}, "params has 'n'"),
        ({"params": []}, r"params is \[\], expected an object"),
        ({"system": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_file_is_checked_whole(tmp_path, change, expected):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({**OLD, **change}))
    with pytest.raises(RequestError, match=expected):
        read(file)


def test_a_file_with_several_conversations_is_not_one(tmp_path):
    file = tmp_path / "many.json"
    file.write_text(json.dumps([OLD, OLD]))
    with pytest.raises(RequestError, match="holds 2 conversations") as refused:
        read(file)
    assert "qwenlet history import" in str(refused.value.hint)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.binary(max_size=50) | st.fixed_dictionaries({}, optional=dict.fromkeys(OLD, json_values)))
def test_wild_files_end_in_our_errors(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "wild.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps({**OLD, **content}).encode())
    try:
        found = loaded(file)
    except QwenletError:
        return
    assert isinstance(found.params, SamplingParams)


# ------------------------------------------------------------------------------------------------------- the tree


def branch(*told: tuple[str, str, dict[str, Any]], settings: Any = None) -> Tree:
    messages = tuple(
        StoredMessage(str(number), "conv_1", str(number - 1) if number else None, role, content, 0.0, extra)
        for number, (role, content, extra) in enumerate(told)
    )
    current = messages[-1].id if messages else None
    return Tree(Conversation("conv_1", "", "m", current, 0.0, 0.0, settings or {}), messages)


def test_any_order_of_messages_is_told_as_it_was():
    """The page and imports know no exchanges."""
    tree = branch(
        ("system", "Once.", {}), ("assistant", "Hello!", {}), ("user", "a", {}), ("user", "b", {}),
        ("assistant", "", {"tool_calls": [CALL]}), ("tool", "12:00", {"tool_call_id": "call_1"}),
        ("assistant", "Noon.", {"finish_reason": "length"}), ("user", "c", {}), ("assistant", "C", {}),
    )  # fmt: skip
    found, unanswered = state_of(tree, "Default.")
    assert unanswered is None
    assert [(e.user, e.assistant, e.finish_reason) for e in found.exchanges] == [
        ("", "Hello!", "stop"), ("a", "", "stop"), ("b", "Noon.", "length"), ("c", "C", "stop"),
    ]  # fmt: skip
    assert found.messages("d") == [*tree.told("Default."), {"role": "user", "content": "d"}]
    assert [(e.question_id, e.leaf_id) for e in found.exchanges] == [(None, "1"), ("2", "2"), ("3", "6"), ("7", "8")]
    again, _ = state_of(tree_of("m", found))
    assert again.exchanges == found.exchanges


def test_a_chosen_system_prompt_stands_for_imported_ones():
    """As the page has it. Until one is chosen, the message that leads is the conversation's own."""
    messages = [("system", "Pirate.", {}), ("user", "a", {}), ("assistant", "b", {})]
    asked = {"role": "user", "content": "c"}
    for settings, system in (({}, "Pirate."), ({"system": "King."}, "King."), ({"system": ""}, None)):
        tree = branch(*messages, settings=settings)
        found, _ = state_of(tree, "Default.")
        told = [one for one in found.messages("c") if one["role"] == "system"]
        assert told == ([] if system is None else [{"role": "system", "content": system}])
        assert found.messages("c") == [*tree.told("Default."), asked]
        again, _ = state_of(tree_of("m", found), "Default.")
        assert again.messages("c") == found.messages("c")
    # what is chosen on the way is the later word, too
    found, _ = state_of(branch(*messages), "Default.")
    chosen = replace(found, system="Queen.").messages("c")
    assert [one["content"] for one in chosen if one["role"] == "system"] == ["Queen."]


def test_a_question_without_a_reply_is_told_apart():
    found, unanswered = state_of(branch(("user", "a", {}), ("assistant", "b", {}), ("user", "c", {})), "Default.")
    assert (found.exchanges, unanswered) == ((Exchange("a", "b"),), "c")
    assert found.messages("c") == [{"role": "system", "content": "Default."}, *found.messages("c")[1:]]


@pytest.mark.parametrize("settings", [{"system": 3}, {"sampling": []}, {"sampling": {"max_tokens": 3}}])
def test_settings_that_are_none_are_refused(settings):
    with pytest.raises(RequestError, match=r"settings|params has"):
        state_of(branch(settings=settings))
