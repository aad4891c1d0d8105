r"""Tool use: is the right tool called, with the right arguments, and none where none helps? Measured as published.

The published questions (Chinese, of 20231206) can't be had any more; two public sets stand in for them:

`tool-use`      Berkeley's function-calling leaderboard: "multiple" (200 questions, one of two to four functions is
                right) and "irrelevance" (240 questions, and a function that doesn't help)
`tool-use-en`,  Glaive's dialogues, up to their first call; where there is none, the call to avoid is of the dialogue's
`tool-use-zh`   own tools, or of the next dialogue's where it has none itself

A line of tooluse/bfcl_v4/BFCL_v4_multiple.json and its answer, shortened:

    {"id": "multiple_0", "question": [[{"role": "user", "content": "Can I find the dimensions and properties of a
    triangle, if I know its three sides are 5 units, 4 units and 3 units long?"}]], "function": [{"name":
    "triangle_properties.get", "description": "Retrieve the dimensions, ...", "parameters": {"type": "dict",
    "properties": {"side1": {"type": "integer", ...}}}}, ...]}
    {"id": "multiple_0", "ground_truth": [{"triangle_properties.get": {"side1": [5], ..., "get_area": ["", true]}}]}

An entry of tooluse/glaive_toolcall/glaive_toolcall_zh_demo.json, shortened:

    {"conversations": [{"from": "human", "value": "我需要为John Doe生成一张发票。"}, {"from": "function_call",
    "value": "{\"name\": \"generate_invoice\", \"arguments\": {\"customer_name\": \"约翰·多伊\", ...}}"}, ...],
    "tools": "[{\"name\": \"generate_invoice\", \"description\": \"生成发票\", \"parameters\": {...}}]"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from qwenlet.chat import Message
from qwenlet.checkpoint import DEFAULT_SYSTEM
from qwenlet.evals.extras import library
from qwenlet.evals.figures import Figure
from qwenlet.evals.rouge import rouge_l
from qwenlet.evals.statistics import mean
from qwenlet.evals.task import GREEDY, Answer, Bench, Dialogue, Result, Sample, Scored, Summary, Task
from qwenlet.tools import STOP_TEXT, Call, Toolbox, ToolMessage, parse_reply, react_messages

# the published script leaves the chat model's own repetition penalty on
PARAMS = replace(GREEDY, repetition_penalty=1.1, stop=(STOP_TEXT,))
POSITIVE, NEGATIVE = "a tool helps", "no tool helps"

_SELECTION, _ROUGE, _FALSE = "selection accuracy", "argument Rouge-L", "false positives"
_OURS, _ARGUMENTS = ", improved extraction", "arguments right"
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # of the leaderboard, in JSON schema's words


class ToolUse(Task):
    """The leaderboard's questions."""

    name = "tool-use"
    title = "Tool use (BFCL multiple and irrelevance, English)"
    kind = "generation"
    chat = True
    measures = ("right",)

    def samples(self, bench: Bench) -> list[Sample]:
        _json5()
        folder = "tooluse/bfcl_v4"
        answers = {
            row["id"]: row["ground_truth"][0]
            for row in bench.data.json_lines(f"{folder}/possible_answer/BFCL_v4_multiple.json")
        }
        found = []
        for row in bench.data.json_lines(f"{folder}/BFCL_v4_multiple.json"):
            name, allowed = next(iter(answers[row["id"]].items()))
            found.append(_sample(row["id"], _asked(row), _functions(row), name, allowed))
        for row in bench.data.json_lines(f"{folder}/BFCL_v4_irrelevance.json"):
            found.append(_sample(row["id"], _asked(row), _functions(row)))
        return found

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        toolbox = Toolbox.of(functions=sample.fields["functions"])
        published = published_call(answer.text)
        calls = parse_reply(answer.text, toolbox).calls
        call = calls[0] if calls else None
        called = "\nAction: " in answer.text
        extracted = {
            "published": published[0] if called else "(no call)",
            "improved": "(no call)" if call is None else f"{call.name}({call.arguments})",
        }
        if sample.target is None:
            wrong = {_FALSE: float(called), _FALSE + _OURS: float(call is not None)}
            return Scored({"right": 1.0 - wrong[_FALSE], **wrong}, extracted)
        name, allowed = sample.target["name"], sample.target["allowed"]
        right = called and published[0].strip().lower() == name.lower()
        values = {
            "right": float(right),
            _SELECTION: float(right),
            _ROUGE: rouge_l(sample.target["arguments"], published[1], bench.tokenizer),
            _SELECTION + _OURS: float(call is not None and call.name == name),
            _ARGUMENTS: float(call is not None and call.name == name and fits(call, allowed)),
        }
        return Scored(values, extracted)

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        """The published three; by a parser that forgives slips; and calls that are right as a whole."""
        figures = []
        for measure in (_SELECTION, _ROUGE, _FALSE, _SELECTION + _OURS, _FALSE + _OURS, _ARGUMENTS):
            values = [r.scored.values[measure] for r in results if measure in r.scored.values]
            if values:
                figures.append(Figure(measure, *mean(values), higher_is_better=not measure.startswith(_FALSE)))
        return Summary(tuple(figures))


class ToolUseEn(ToolUse):
    """Glaive's dialogues in English."""

    name = "tool-use-en"
    title = "Tool use (Glaive, English)"
    language = "en"

    def samples(self, bench: Bench) -> list[Sample]:
        _json5()
        rows = bench.data.json(f"tooluse/glaive_toolcall/glaive_toolcall_{self.language}_demo.json")
        tools = [json.loads(row["tools"] or "[]") for row in rows]
        found = []
        for number, row in enumerate(rows):
            conversation, call = _until_call(row["conversations"])
            later = (*range(number, len(rows)), *range(number))
            offered = next(tools[index] for index in later if tools[index])
            functions = [one if "parameters" in one else {**one, "parameters": _nothing()} for one in offered]
            id = f"{self.language}/{number}"
            if call is None:
                found.append(_sample(id, conversation, functions))
            else:
                allowed = {name: [value] for name, value in call["arguments"].items()}
                found.append(_sample(id, conversation, functions, call["name"], allowed))
        return found


class ToolUseZh(ToolUseEn):
    """Glaive's dialogues in Chinese."""

    name = "tool-use-zh"
    title = "Tool use (Glaive, Chinese)"
    language = "zh"


def _sample(
    id: str,
    conversation: Sequence[ToolMessage],
    functions: Sequence[Mapping[str, Any]],
    name: str | None = None,
    allowed: Mapping[str, Sequence[Any]] | None = None,
) -> Sample:
    """Args: allowed: argument -> values that are right; "" among them says that it may be left out."""
    toolbox = Toolbox.of(functions=functions)
    messages = react_messages(conversation, toolbox)
    if messages[0].role != "system":
        messages = [Message("system", DEFAULT_SYSTEM), *messages]
    question = Dialogue(tuple(messages), PARAMS)
    if name is None:
        return Sample(id, question, None, NEGATIVE, {"functions": list(functions)})
    allowed = allowed or {}
    # the shortest right call: what may be left out is
    arguments = {argument: values[0] for argument, values in allowed.items() if "" not in values}
    target = {"name": name, "arguments": _sorted(arguments), "allowed": dict(allowed)}
    return Sample(id, question, target, POSITIVE, {"functions": list(functions)})


def _sorted(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False, sort_keys=True)


def _asked(row: Mapping[str, Any]) -> list[ToolMessage]:
    return [ToolMessage(message["role"], message["content"]) for message in row["question"][0]]


def _functions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**function, "parameters": _schema(function["parameters"])} for function in row["function"]]


def _schema(value: Any) -> Any:
    """The leaderboard's types in JSON schema's words; "any" is no restriction."""
    if isinstance(value, Mapping):
        kind = value.get("type")
        rest = {key: _schema(entry) for key, entry in value.items() if not (key == "type" and kind == "any")}
        return rest | {"type": _TYPES[kind]} if isinstance(kind, str) and kind in _TYPES else rest
    return [_schema(entry) for entry in value] if isinstance(value, list) else value


def _nothing() -> dict[str, Any]:
    return {"type": "object", "properties": {}}


def _until_call(turns: Sequence[Mapping[str, str]]) -> tuple[list[ToolMessage], dict[str, Any] | None]:
    """(the dialogue up to its first call, the call), or (its first question, None)."""
    roles = {"human": "user", "gpt": "assistant"}
    messages: list[ToolMessage] = []
    for turn in turns:
        if turn["from"] == "function_call":
            return messages, json.loads(turn["value"])
        if turn["from"] in roles:
            role: Any = roles[turn["from"]]
            messages.append(ToolMessage(role, turn["value"]))
    return messages[:1], None


# -------------------------------------------------------------------------------------------------- extraction


def published_call(reply: str) -> tuple[str, str]:
    """(action, arguments as sorted JSON or ""), read as published: between the first words of each kind, by json5."""
    reply += "\n"
    between = [reply.find(word) for word in ("Action:", "Action Input:", "Observation:")]
    action = reply[between[0] + len("Action:") : between[1]].strip()
    written = reply[between[1] + len("Action Input:") : between[2]].strip()
    json5 = _json5()  # a missing one is no reply that can't be read
    try:
        return action, _sorted(json5.loads(written))
    except Exception:  # whatever a parser makes of what a model wrote: it could not be read
        return action, ""


def fits(call: Call, allowed: Mapping[str, Sequence[Any]]) -> bool:
    """Whether every argument has a value that is right, all that are needed are there, and no others."""
    json5 = _json5()
    try:
        arguments = json5.loads(call.arguments)
    except Exception:  # as above
        return False
    if not isinstance(arguments, dict) or not arguments.keys() <= allowed.keys():
        return False
    return all(
        any(_same(arguments[name], value) for value in values) if name in arguments else "" in values
        for name, values in allowed.items()
    )


def _same(value: Any, right: Any) -> bool:
    """Equal; texts without regard to case and blanks, objects by the values each of their fields may have."""
    if isinstance(value, str) and isinstance(right, str):
        return "".join(value.split()).casefold() == "".join(right.split()).casefold()
    if isinstance(value, dict) and isinstance(right, dict):
        return value.keys() == right.keys() and all(
            any(_same(value[key], one) for one in (right[key] if isinstance(right[key], list) else [right[key]]))
            or _same(value[key], right[key])
            for key in right
        )
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(map(_same, value, right))
    return isinstance(value, bool) == isinstance(right, bool) and bool(value == right)


def _json5() -> ModuleType:
    return library("json5", "reading calls as the published script does")
