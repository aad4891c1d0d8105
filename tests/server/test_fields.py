"""Every field of a request is honoured, named as ignored, or refused by name: nested ones, too."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.conftest import Server

ASK = [{"role": "user", "content": "Is the sky blue?"}]


def test_nested_fields_without_effect_are_named(server: Server) -> None:
    schema = {"name": "x", "strict": True, "schema": {"type": "object", "additionalProperties": False}}
    answer = server.call(
        "POST",
        "/v1/chat/completions",
        {
            "messages": [{**ASK[0], "name": "me"}, {**ASK[0], "name": "you"}],
            "response_format": {"type": "json_schema", "json_schema": schema},
            "stream_options": {"include_obfuscation": False},
            "max_tokens": 8,
        },
    )
    assert answer.status == 200, answer.raw
    assert set(answer.headers["x-qwenlet-ignored"].split(", ")) == {
        "messages[].name",
        "response_format.json_schema.name",
        "response_format.json_schema.strict",
        "stream_options.include_obfuscation",
    }


REFUSED: dict[str, Any] = {
    "audio": {"voice": "x"},
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "return_token_ids": True,
    "guided_grammar": "root ::= x",
    "truncate_prompt_tokens": 10,
    "prompt_logprobs": 1,
    "chat_template": "{{ x }}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(server: Server, name: str) -> None:
    answer = server.chat(**{name: REFUSED[name]})
    assert (answer.status, answer.error["param"]) == (400, name)
    assert answer.error["code"] == "unsupported_parameter"


def test_nested_fields_are_refused_by_their_place(server: Server) -> None:
    part = {"type": "text", "text": "x", "image_url": {"url": "x"}}
    body = {"messages": [*ASK, {"role": "user", "content": [part]}]}
    assert server.call("POST", "/v1/chat/completions", body).error["param"] == "messages[1].content[0].image_url"
    assert server.chat(structured_outputs={"grammar": "x"}).error["param"] == "structured_outputs.grammar"


def test_values_that_change_nothing_are_taken(server: Server) -> None:
    answer = server.chat(skip_special_tokens=True, include_stop_str_in_output=False, max_tokens=1)
    assert answer.status == 200
    assert "x-qwenlet-ignored" not in answer.headers


def test_biases_act(server: Server) -> None:
    (token,) = server.call("POST", "/tokenize", {"prompt": "!"}).json["tokens"]
    text = server.chat(logit_bias={str(token): 100}, max_tokens=3).json["choices"][0]["message"]["content"]
    assert text == "!!!"
    assert server.chat(logit_bias={"word": 1}).error["param"] == "logit_bias"
    assert server.chat(logit_bias={"999999999": 1}).status == 400


def test_least_lengths_hold(server: Server) -> None:
    """Without one this answer is short."""
    short = server.chat("Say only: yes", max_tokens=60).json
    assert short["choices"][0]["finish_reason"] == "stop"
    wanted = short["usage"]["completion_tokens"] + 5
    longer = server.chat("Say only: yes", max_tokens=60, min_tokens=wanted).json
    assert longer["usage"]["completion_tokens"] >= wanted


@pytest.mark.parametrize(
    "fields",
    [{"guided_choice": ["yes, sir", "no (sir)"]}, {"structured_outputs": {"choice": ["yes, sir", "no (sir)"]}}],
)
def test_choices_hold(server: Server, fields: dict[str, Any]) -> None:
    text = server.chat(**fields, max_tokens=20).json["choices"][0]["message"]["content"]
    assert text in ("yes, sir", "no (sir)")


def test_other_names_of_grammars(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    for fields in ({"guided_json": schema}, {"structured_outputs": {"json": schema}}, {"json_schema": schema}):
        text = server.chat(**fields, max_tokens=20).json["choices"][0]["message"]["content"]
        assert set(json.loads(text)) == {"a"}
    assert server.chat(guided_regex="[0-9]{3}").json["choices"][0]["message"]["content"].isdigit()
    assert server.chat(guided_regex="a", guided_json=schema).status == 400


STOPS = ["x"] * 257
MANY = {
    "stop": ("/v1/completions", {"prompt": "a", "stop": STOPS}),
    "stop_token_ids": ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 1025}),
    "logit_bias": ("/v1/completions", {"prompt": "a", "logit_bias": {str(id): 1 for id in range(1025)}}),
    "stop_sequences": ("/v1/messages", {"messages": ASK, "max_tokens": 1, "stop_sequences": STOPS}),
    "options.stop": ("/api/generate", {"prompt": "a", "options": {"stop": STOPS}}),
}


@pytest.mark.parametrize("name", MANY)
def test_what_every_token_is_held_against_is_limited(server: Server, name: str) -> None:
    path, body = MANY[name]
    answer = server.call("POST", path, body)
    assert answer.status == 400
    assert f"$.{name}" in answer.raw.decode()


def test_much_is_held_against_every_token(server: Server) -> None:
    assert server.chat(stop="x" * 1001).status == 400
    assert server.chat(stop=["x" * 1000] * 256, stop_token_ids=[1] * 1024, max_tokens=1).status == 200
