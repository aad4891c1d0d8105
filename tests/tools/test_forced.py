"""Forced calls: whatever is drawn under the grammar parses into the calls that were asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenlet.config import GrammarSpec, SamplingParams
from qwenlet.errors import RequestError
from qwenlet.gguf_header import read_header
from qwenlet.grammar import Grammars, Matcher
from qwenlet.tokenizer import Tokenizer
from qwenlet.tools import Reply, Toolbox, forced_reply, parse_reply

ENDS = [0, 2]
WEATHER = {
    "name": "天气",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", 'a "b"\n c']},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
    },
}
CLOCK = {"name": "clock"}
NAMED = {"type": "function", "function": {"name": "天气"}}


@pytest.fixture(scope="module")
def tokenizer(demo_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(read_header(demo_gguf).metadata, demo_gguf)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, ENDS)


def draw(tokenizer: Tokenizer, matcher: Matcher, seed: int, ends: float) -> str:
    """A random walk to an end token, which is taken this often where it may come."""
    dice, ids = random.Random(seed), []
    for _ in range(600):
        allowed = np.flatnonzero(matcher.allowed()).tolist()
        end = next((id for id in ENDS if id in allowed), None)
        if end is not None and (len(allowed) <= len(ENDS) or dice.random() < ends):
            return tokenizer.decode(ids)
        chosen = dice.choice([id for id in allowed if id not in ENDS])
        matcher.accept(chosen)
        ids.append(chosen)
    raise AssertionError(f"no end: {tokenizer.decode(ids)!r}")


def drawn(
    tokenizer: Tokenizer, grammars: Grammars, box: Toolbox, thinking: bool, seeds: int = 6, ends: float = 0.75
) -> list[Reply]:
    lark = forced_reply(box, thinking=thinking)
    assert lark is not None
    spec = SamplingParams(lark=lark).grammar
    assert spec == GrammarSpec("lark", lark)
    replies = []
    for seed in range(seeds):
        text = draw(tokenizer, grammars.compile(spec).matcher(), seed, ends)
        replies.append(parse_reply(text, box, thinking=thinking))
    return replies


def check(arguments: str) -> None:
    given = json.loads(arguments)
    assert set(given) == {"city", "days"}
    assert given["city"] in WEATHER["parameters"]["properties"]["city"]["enum"]  # type: ignore[index]
    assert 1 <= given["days"] <= 9


@pytest.mark.parametrize("thinking", [False, True])
def test_a_named_tool_is_called_once(tokenizer: Tokenizer, grammars: Grammars, thinking: bool):
    box = Toolbox.of([WEATHER, CLOCK], NAMED)
    for reply in drawn(tokenizer, grammars, box, thinking):
        assert reply.text == ""
        assert [call.name for call in reply.calls] == ["天气"]
        check(reply.calls[0].arguments)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_required_call_chooses(tokenizer: Tokenizer, grammars: Grammars, thinking: bool):
    replies = drawn(tokenizer, grammars, Toolbox.of([WEATHER, CLOCK], "required"), thinking, seeds=12)
    assert {call.name for reply in replies for call in reply.calls} == {"天气", "clock"}
    for reply in replies:
        assert reply.text == ""
        assert len(reply.calls) == 1
        if reply.calls[0].name == "clock":
            assert json.loads(reply.calls[0].arguments) == {}
        else:
            check(reply.calls[0].arguments)


def test_names_and_schemas_that_hold_a_word_of_the_grammar(tokenizer: Tokenizer, grammars: Grammars):
    """%json begins a schema, but not within a name, a description or an enum."""
    text = {"type": "string", "description": "as %json text", "enum": ['%json "', "%json {"]}
    schema = {"type": "object", "properties": {"a": text}, "required": ["a"]}
    box = Toolbox.of([{"name": '%json"x', "parameters": schema}], "required")
    (reply,) = drawn(tokenizer, grammars, box, False, seeds=1)
    assert json.loads(reply.calls[0].arguments)["a"] in text["enum"]


def test_several_calls_where_they_were_asked_for(tokenizer: Tokenizer, grammars: Grammars):
    box = Toolbox.of([CLOCK], "required", parallel_tool_calls=True)
    counts = {len(reply.calls) for reply in drawn(tokenizer, grammars, box, False, seeds=16, ends=0.2)}
    assert min(counts) == 1
    assert 1 < max(counts) <= 8


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_a_free_reply_has_no_grammar(choice: Any):
    assert forced_reply(Toolbox.of([CLOCK], choice)) is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"type": "nonsense"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}},
        {"type": "object", "properties": {"a": {"type": "number", "multipleOf": 10007.3}}},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9000)}},
    ],
)
def test_a_schema_that_does_not_compile_or_costs_too_much_is_refused(grammars: Grammars, parameters: dict[str, Any]):
    lark = forced_reply(Toolbox.of([{"name": "x", "parameters": parameters}], "required"))
    with pytest.raises(RequestError, match=r"does not compile|multipleOf|characters"):
        grammars.compile(GrammarSpec("lark", lark or ""))


def test_a_recursive_schema_compiles(tokenizer: Tokenizer, grammars: Grammars):
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}
    box = Toolbox.of([{"name": "x", "parameters": tree | {"$defs": {"tree": tree}}}], "required")
    for reply in drawn(tokenizer, grammars, box, False, seeds=3):
        assert isinstance(json.loads(reply.calls[0].arguments), dict)
