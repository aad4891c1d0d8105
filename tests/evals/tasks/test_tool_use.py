"""Tool use on made-up questions of both layouts: prompts, extraction as published and ours, the three measures."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from qwenlet.chat import Message
from qwenlet.errors import MissingExtraError
from qwenlet.evals import tasks
from qwenlet.evals.task import Answer, Bench, Dialogue, Result, Sample
from qwenlet.evals.tasks.tool_use import fits, published_call
from qwenlet.tools import Call

FUNCTIONS = [
    {
        "name": "weather.get", "description": "Weather of a city.",
        "parameters": {
            "type": "dict", "required": ["city"],
            "properties": {"city": {"type": "string"}, "days": {"type": "float"}, "unit": {"type": "any"}},
        },
    },
    {"name": "clock", "description": "Time.", "parameters": {"type": "dict", "properties": {}}},
]  # fmt: skip
ALLOWED = {"city": ["Paris", "Paris, France"], "days": ["", 2], "unit": ["", "C"]}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def questions(bench: Bench) -> Bench:
    folder = bench.data.root / "tooluse" / "bfcl_v4"
    (folder / "possible_answer").mkdir(parents=True)

    def asked(id: str, text: str) -> dict[str, Any]:
        return {"id": id, "question": [[{"role": "user", "content": text}]], "function": FUNCTIONS}

    (folder / "BFCL_v4_multiple.json").write_text(lines(asked("multiple_0", "Weather in Paris?")))
    (folder / "BFCL_v4_irrelevance.json").write_text(lines(asked("irrelevance_0", "Who wrote Faust?")))
    answer = {"id": "multiple_0", "ground_truth": [{"weather.get": ALLOWED}]}
    (folder / "possible_answer" / "BFCL_v4_multiple.json").write_text(lines(answer))
    glaive = bench.data.root / "tooluse" / "glaive_toolcall"
    glaive.mkdir()
    dialogues = [
        {
            "conversations": [
                {"from": "human", "value": "你好"},
                {"from": "gpt", "value": "你好！"},
                {"from": "human", "value": "北京天气？"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京"}}'},
                {"from": "observation", "value": "{}"},
            ],
            "tools": json.dumps([{"name": "weather", "description": "天气", "parameters": {"type": "object"}}]),
        },
        {
            "conversations": [{"from": "human", "value": "谁写了红楼梦？"}, {"from": "gpt", "value": "曹雪芹"}],
            "tools": "[]",
        },
    ]
    (glaive / "glaive_toolcall_zh_demo.json").write_text(json.dumps(dialogues))
    return bench


def scored(bench: Bench, sample: Sample, reply: str) -> dict[str, float]:
    return dict(tasks.get("tool-use").score(sample, Answer(texts=(reply,)), bench).values)


def test_the_prompt_is_the_published_one(questions: Bench) -> None:
    helps, _ = tasks.get("tool-use").samples(questions)
    assert isinstance(helps.question, Dialogue)
    system, user = helps.question.messages
    assert system == Message("system", "You are a helpful assistant.")
    assert user.content.startswith("Answer the following questions as best you can. You have access to the following")
    assert user.content.endswith("Begin!\n\nQuestion: Weather in Paris?")
    assert "should be one of [weather.get, clock]" in user.content
    # the leaderboard's own words for types are JSON schema's here
    assert '"city": {"type": "string"}, "days": {"type": "number"}, "unit": {}' in user.content
    assert helps.question.params.repetition_penalty == 1.1


def test_a_right_call(questions: Bench) -> None:
    helps, _ = tasks.get("tool-use").samples(questions)
    assert helps.target["arguments"] == '{"city": "Paris"}'
    values = scored(questions, helps, 'Thought: I look.\nAction: weather.get\nAction Input: {"city": "Paris"}')
    assert set(values.values()) == {1.0}
    assert len(values) == 5


@pytest.mark.parametrize(
    ("reply", "published", "improved", "arguments"),
    [
        ('I look.\nAction: clock\nAction Input: {"city": "Paris"}', 0, 0, 0),
        ('I look.\nAction: Weather.Get\nAction Input: {"city": "Paris"}', 1, 1, 1),
        ('Action: weather.get\nAction Input: {"city": "Paris"}', 0, 1, 1),  # no line before: published sees no call
        ('I look.\n**Action:** weather.get\n**Action Input:** {"city": "Paris"}', 0, 1, 1),
        ('I look.\nAction: weather.get\nAction Input: {"city": "Rome"}', 1, 1, 0),
        ('I look.\nAction: weather.get\nAction Input: {"city": "Paris", "days": 2}', 1, 1, 1),
        ('I look.\nAction: weather.get\nAction Input: {"city": "Paris", "moon": 2}', 1, 1, 0),
        ("I look.\nAction: weather.get\nAction Input: {'city': 'Paris',}", 1, 1, 1),  # JSON5
        ("It rains.", 0, 0, 0),
    ],
)
def test_replies_where_a_tool_helps(
    questions: Bench, reply: str, published: float, improved: float, arguments: float
) -> None:
    values = scored(questions, tasks.get("tool-use").samples(questions)[0], reply)
    found = [values[name] for name in ("selection accuracy", "selection accuracy, improved extraction")]
    assert [*found, values["arguments right"]] == [published, improved, arguments]


def test_arguments_that_can_not_be_read_are_worth_nothing(questions: Bench) -> None:
    """As published: the mean is over all questions."""
    helps, _ = tasks.get("tool-use").samples(questions)
    values = scored(questions, helps, "I look.\nAction: weather.get\nAction Input: Paris, I think")
    assert values["argument Rouge-L"] == 0.0
    near = scored(questions, helps, 'I look.\nAction: weather.get\nAction Input: {"city": "Parma"}')
    assert 0.0 < near["argument Rouge-L"] < 1.0


def test_a_call_where_none_helps_is_a_false_positive(questions: Bench) -> None:
    _, useless = tasks.get("tool-use").samples(questions)
    assert useless.target is None
    call = scored(questions, useless, "I look.\nAction: clock\nAction Input: {}")
    assert call["false positives"] == call["false positives, improved extraction"] == 1.0
    assert set(scored(questions, useless, "Thought: no tool.\nFinal Answer: Goethe").values()) == {0.0, 1.0}
    # an action that names none of the tools is a call to the published rule alone
    invented = scored(questions, useless, "I look.\nAction: search\nAction Input: {}")
    assert (invented["false positives"], invented["false positives, improved extraction"]) == (1.0, 0.0)


def test_the_summary_keeps_the_kinds_apart(questions: Bench) -> None:
    task = tasks.get("tool-use")
    replies = [
        'I look.\nAction: weather.get\nAction Input: {"city": "Paris"}',
        "I look.\nAction: clock\nAction Input: {}",
    ]
    results = [
        Result(sample, Answer(texts=(reply,)), task.score(sample, Answer(texts=(reply,)), questions))
        for sample, reply in zip(task.samples(questions), replies, strict=True)
    ]
    figures = {figure.name: figure for figure in task.summary(results, questions).figures}
    assert (figures["selection accuracy"].value, figures["selection accuracy"].count) == (1.0, 1)
    assert figures["false positives"].value == 1.0
    assert not figures["false positives"].higher_is_better


def test_dialogues_are_asked_up_to_their_first_call(questions: Bench) -> None:
    helps, useless = tasks.get("tool-use-zh").samples(questions)
    assert isinstance(helps.question, Dialogue)
    assert [message.role for message in helps.question.messages] == ["system", "user", "assistant", "user"]
    assert helps.question.messages[1].content.endswith("Question: 你好")
    assert helps.question.messages[-1].content == "北京天气？"
    assert helps.target["name"] == "weather"
    # a question without tools is offered those of the next dialogue that has some
    assert useless.target is None
    assert isinstance(useless.question, Dialogue)
    assert "weather: Call this tool" in useless.question.messages[-1].content


def test_the_published_reading() -> None:
    reply = 'Thought: x\nAction: a b \nAction Input: {"z": 1, "a": "你"}\nObservation: y'
    assert published_call(reply) == ("a b", '{"a": "你", "z": 1}')
    assert published_call('Thought: x\nAction: a\nAction Input: {"z": 1}') == ("a", '{"z": 1}')
    assert published_call("nothing")[1] == ""


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ('{"city": "paris"}', True),
        ('{"city": "Paris,France"}', True),
        ('{"city": "Paris", "days": 2.0}', True),
        ('{"city": "Paris", "days": true}', False),
        ('{"days": 2}', False),
        ("[]", False),
        ("not json", False),
    ],
)
def test_calls_that_are_right_as_a_whole(arguments: str, right: bool) -> None:
    assert fits(Call("1", "weather.get", arguments), ALLOWED) is right


def test_values_inside_values() -> None:
    allowed = {"at": [{"x": [1, 2], "y": [3]}], "path": [[[1, 2], [3]]]}
    assert fits(Call("1", "f", '{"at": {"x": 2, "y": 3}, "path": [[1, 2], [3]]}'), allowed)
    assert not fits(Call("1", "f", '{"at": {"x": 3, "y": 3}, "path": [[1, 2], [3]]}'), allowed)
    assert not fits(Call("1", "f", '{"at": {"x": 1}, "path": [[1, 2]]}'), allowed)


def test_without_json5_the_install_line(questions: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json5", None)
    with pytest.raises(MissingExtraError, match=r"qwenlet\[evals\]"):
        tasks.get("tool-use").samples(questions)
