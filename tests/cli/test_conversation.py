"""The conversation's state: undo, settings by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.cli.conversation import CHAT_PARAMS, Conversation, Exchange, State, parse_param
from qwenlet.config import SamplingParams
from qwenlet.errors import QwenletError, RequestError


def talk(*exchanges: Exchange, **params: object) -> Conversation:
    return Conversation("demo", State("Be brief.", SamplingParams(**params), exchanges))


def test_undo_takes_back_one_change_after_another():
    conversation = talk(Exchange("from a file", "ok"))
    more = (*conversation.exchanges, Exchange("a", "b"))
    conversation.change("the last exchange", replace(conversation.state, exchanges=more))
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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


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
