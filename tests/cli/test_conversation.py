"""The conversation's state: undo, settings by name, and a file that is written whole and read with suspicion."""

from __future__ import annotations

import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.cli.conversation import CHAT_PARAMS, Conversation, Exchange, State, parse_param, read
from qwenlet.config import SamplingParams
from qwenlet.errors import QwenletError, RequestError


def talk(*exchanges: Exchange, **params: object) -> Conversation:
    return Conversation("demo", State("Be brief.", SamplingParams(**params), exchanges))


def test_undo_takes_back_one_change_after_another():
    conversation = talk(Exchange("from a file", "ok"))
    conversation.add(Exchange("a", "b"))
    conversation.set_params(temperature=0.5)
    assert conversation.undo() == "the change of temperature"
    assert conversation.params.temperature is None
    assert conversation.undo() == "the last exchange"
    assert conversation.undo() == "the last exchange", "also one that was there at the start"
    with pytest.raises(RequestError, match="nothing to undo"):
        conversation.undo()


def test_a_refused_setting_changes_nothing():
    conversation = talk(temperature=0.5)
    with pytest.raises(RequestError):
        conversation.set_params(temperature=-1)
    assert conversation.params.temperature == 0.5
    with pytest.raises(RequestError, match="nothing to undo"):
        conversation.undo()


def test_what_is_saved_is_loaded(tmp_path):
    file = tmp_path / "talk.json"
    conversation = talk(
        Exchange("你好", "hi\n```\n"), Exchange("go on", "half a", "cancelled"), seed=3, stop=("a", "b")
    )
    conversation.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    other = talk()
    assert other.load(file) == "demo"
    assert other.state == conversation.state
    other.undo()
    assert other.exchanges == ()


def test_saving_again_overwrites_a_conversation_and_nothing_else(tmp_path):
    file, precious = tmp_path / "talk.json", tmp_path / "notes.txt"
    talk().save(file)
    talk(Exchange("a", "b")).save(file)
    assert len(json.loads(file.read_text())["messages"]) == 2
    precious.write_text("my work")
    with pytest.raises(RequestError, match="not a saved conversation"):
        talk().save(precious)
    assert precious.read_text() == "my work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "talk.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "talk.json"
    talk(Exchange("old", "old")).save(file)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RequestError, match="No space left"):
        talk().save(file)
    assert read(file)[1].exchanges == (Exchange("old", "old"),)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_saving_where_there_is_no_folder(tmp_path):
    with pytest.raises(RequestError, match=r"can't write into .*nowhere: No such file"):
        talk().save(tmp_path / "nowhere" / "talk.json")


GOOD = {
    "version": 1,
    "model": "demo",
    "system": "",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "params": {},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "version is 2, expected 1"),
        ({"model": None}, "model is None"),
        ({"system": 5}, "system is 5"),
        ({"messages": "hi"}, "messages is not a list"),
        ({"messages": GOOD["messages"][:1]}, "messages is not a list of questions and replies in turn"),
        ({"messages": GOOD["messages"][::-1]}, "message 0 is .*expected an object with role 'user'"),
        ({"messages": [{"role": "user", "content": 1}, GOOD["messages"][1]]}, "message 0 has content 1"),
        ({"messages": [{**GOOD["messages"][0], "name": "x"}, GOOD["messages"][1]]}, "message 0 is"),
        ({"params": {"temprature": 1}}, "params has 'temprature'"),
        ({"params": {"temperature": -1}}, "params: temperature is -1"),
        ({"params": {"stop_token_ids": {}}}, "params: stop_token_ids is {}"),
        ({"params": {"n": 3}}, "params has 'n'"),
        ({"params": []}, r"params is \[\], expected a JSON object"),
        ({"system": "\ud800"}, "not a saved conversation"),
    ],
)
def test_a_file_is_checked_whole_before_anything_is_replaced(tmp_path, change, expected):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({**GOOD, **change}))
    conversation = talk(Exchange("kept", "kept"))
    before = conversation.state
    with pytest.raises(RequestError, match=expected):
        conversation.load(file)
    assert conversation.state == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.binary(max_size=50) | st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, json_values)))
def test_wild_files_end_in_our_errors(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "wild.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps({**GOOD, **content}).encode())
    try:
        _, state = read(file)
    except QwenletError:
        return
    talk().load(file)
    assert isinstance(state.params, SamplingParams)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("temperature", "default", None),
        ("presence_penalty", "default", 0.0),
        ("top_k", "5", 5),
        ("stop", "###", "###"),
        ("stop", '["\\n\\n", "End"]', ["\n\n", "End"]),
        ("stop_token_ids", "5", (5,)),
        ("ignore_eos", "true", True),
    ],
)
def test_values_as_typed(name, text, value):
    assert parse_param(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("temprature", "1", "did you mean temperature"),
        ("n", "2", "there is no setting 'n'"),
        ("ignore_eos", "yes", "expected true or false"),
        ("stop", "5", "stop is 5, expected a list"),
    ],
)
def test_values_that_are_refused(name, text, expected):
    with pytest.raises(RequestError, match=expected):
        parse_param(name, text)


@given(st.sampled_from(CHAT_PARAMS), json_values.map(json.dumps) | st.text(max_size=8))
def test_wild_values_are_taken_or_refused(name, text):
    conversation = talk()
    try:
        conversation.set_params(**{name: parse_param(name, text)})
    except QwenletError:
        assert conversation.params == SamplingParams()
