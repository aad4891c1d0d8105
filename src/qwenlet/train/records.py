"""Files of training data -> records: dialogues and texts, each with its file and line. No torch in here.

    conversations   [{"from": "user", "value": ...}]: the published form, and ShareGPT's names of the same roles
    messages        [{"role": "user", "content": ...}]: OpenAI's form, with tools and tool calls
    alpaca          instruction, input, output, system, history
    prompt          prompt and completion: texts, or lists of messages
    text            {"text": ...}, a list of texts, or a file that isn't JSON

A file is a list (.json), a record a line (.jsonl) or plain text (anything else); which form a record has it says by its
fields. Left out: tokens (samples.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwenlet.chat import Message
from qwenlet.errors import DataError, RequestError
from qwenlet.tools import Toolbox, ToolMessage, react_messages, react_replies

_SHOWN = 8  # broken records that one error lists

# what data sets call the roles
_ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip
_FIELDS = {
    "conversations": {"conversations", "system", "tools"},
    "messages": {"messages", "tools", "parallel_tool_calls"},
    "alpaca": {"instruction", "input", "output", "system", "history"},
    "prompt": {"prompt", "completion", "response"},
    "text": {"text"},
}
# what data sets carry beside, for people: nothing of it changes what is learned
_INERT = {"id", "idx", "index", "source", "category", "dataset", "lang", "language", "meta", "metadata", "title", "url"}


@dataclass(frozen=True)
class Dialogue:
    """A conversation.

    Attributes:
        where: "file.jsonl:12".
        learned: for each message whether it is learned, if it is the assistant's.
        form: which of the forms it had.
        dropped: messages before the first question that were left out, as the published code does.
        parts: of a dialogue in which the tools moved from question to question, as they do in a chat: its beginnings,
            each with the tools where some of its replies had them, and these learned. The messages themselves have them
            where they were when the last question was asked. Empty where one text is true for all.
    """

    where: str
    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    form: str
    dropped: int = 0
    parts: tuple[Dialogue, ...] = ()


@dataclass(frozen=True)
class Text:
    """A text, of which `prompt` is given and not learned."""

    where: str
    text: str
    prompt: str = ""
    form: str = "text"


Record = Dialogue | Text


@dataclass
class Bad:
    """Records that can't be used: (where, why) each."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def error(self) -> DataError:
        shown = "\n".join(f"  {where}: {why}" for where, why in self.found[:_SHOWN])
        more = f"\n  ... and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
        count = len(self.found)
        return DataError(
            f"{count} record{'s' if count > 1 else ''} can't be used:\n{shown}{more}",
            hint="mend them, or leave them out with --bad skip",
        )


def read_records(paths: Sequence[str | Path], *, skip_bad: bool = False) -> tuple[list[Record], Bad]:
    """All records of some files, and those that were left out.

    Args:
        skip_bad: leave out records that can't be used; otherwise they are an error, all of them in one message.
    Raises:
        DataError: a file that can't be read, JSON that is broken (file and line), no record, or bad ones.
    """
    records: list[Record] = []
    bad = Bad()
    for path in map(Path, paths):
        for line, value in read_values(path):
            where = f"{path}:{line}"
            try:
                records.append(read_record(value, where))
            except RequestError as error:
                bad.found.append((where, error.message))
    if bad.found and not skip_bad:
        raise bad.error()
    if not records:
        raise DataError(f"there is no record in {', '.join(map(str, paths))}")
    return records, bad


def read_record(value: Any, where: str) -> Record:
    """One parsed record. Raises RequestError that says what is wrong with it."""
    if isinstance(value, str):
        return _text(value, where)
    if not isinstance(value, Mapping):
        raise RequestError(f"a record is {value!r:.60}, expected an object or a text")
    form = _form(value)
    unknown = sorted(value.keys() - _FIELDS[form] - _INERT)
    if unknown:
        raise RequestError(
            f"the field {unknown[0]!r} is not understood beside {form!r}; known are {', '.join(sorted(_FIELDS[form]))}"
        )
    return _READERS[form](value, where)


def _form(value: Mapping[str, Any]) -> str:
    if "chosen" in value or "rejected" in value:
        raise RequestError("it has 'chosen' and 'rejected', which are for --method dpo")
    for form, name in (("conversations", "conversations"), ("messages", "messages"), ("alpaca", "instruction"),
                       ("prompt", "prompt"), ("text", "text")):  # fmt: skip
        if name in value:
            return form
    raise RequestError(
        f"it has the fields {', '.join(map(repr, value)) or 'none'}, expected conversations, messages, instruction and "
        "output, prompt and completion, or text"
    )


# ----------------------------------------------------------------------------------------------------------- the forms


def _conversations(value: Mapping[str, Any], where: str) -> Record:
    turns = value["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RequestError(f"conversations is {turns!r:.60}, expected a list of turns")
    raw: list[dict[str, Any]] = []
    if value.get("system"):
        raw.append({"role": "system", "content": value["system"]})
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise RequestError(f"turn {number} is {turn!r:.60}, expected an object with from and value")
        role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise RequestError(f"turn {number} is from {turn['from']!r}; known are {', '.join(_ROLES)}")
        if role == "function_call":
            raw.append({"role": "assistant", "content": None, "tool_calls": _sharegpt_calls(turn["value"], number)})
        else:
            raw.append({"role": role, "content": turn["value"]})
    first = 1 if raw[0]["role"] == "system" else 0
    dropped = 0
    while first < len(raw) and raw[first]["role"] != "user":
        del raw[first]
        dropped += 1
    tools = value.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError:
            raise RequestError(f"tools is text that is not JSON: {tools!r:.60}") from None
    return _dialogue(raw, tools, where, "conversations", dropped)


def _sharegpt_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """ShareGPT's call or calls, as JSON text."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError):
        raise RequestError(f"turn {number} is a function call that is not JSON: {value!r:.60}") from None
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, Mapping) or "name" not in call:
            raise RequestError(f"turn {number} is a function call without a name: {value!r:.60}")
        arguments = call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        made.append({"id": "", "function": {"name": call["name"], "arguments": text}})
    return made


def _messages(value: Mapping[str, Any], where: str) -> Record:
    return _dialogue(value["messages"], value.get("tools"), where, "messages")


def _alpaca(value: Mapping[str, Any], where: str) -> Record:
    if "output" not in value:
        raise RequestError("it has an instruction and no output")
    raw: list[dict[str, Any]] = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    history = value.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise RequestError(f"history is {history!r:.60}, expected a list of [question, answer]")
    for question, answer in history:
        raw += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [_checked_text(value["instruction"], "instruction"), _checked_text(value.get("input") or "", "input")]
    raw.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    raw.append({"role": "assistant", "content": value["output"]})
    return _dialogue(raw, None, where, "alpaca")


def _prompt(value: Mapping[str, Any], where: str) -> Record:
    named = [name for name in ("completion", "response") if name in value]
    if len(named) != 1:
        raise RequestError("it has a prompt; expected a completion beside it")
    prompt, completion = value["prompt"], value[named[0]]
    if isinstance(prompt, list) or isinstance(completion, list):
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise RequestError("prompt and completion must both be texts, or both lists of messages")
        whole = _dialogue([*prompt, *completion], None, where, "prompt")
        given = len(prompt)
        learned = tuple(i >= given for i in range(len(whole.messages)))
        return Dialogue(where, whole.messages, learned, "prompt")
    completion = _checked_text(completion, named[0])
    if not completion:
        raise RequestError(f"{named[0]} is empty")
    return Text(where, completion, _checked_text(prompt, "prompt"), "prompt")


def _plain(value: Mapping[str, Any], where: str) -> Record:
    return _text(value["text"], where)


_READERS = {
    "conversations": _conversations,
    "messages": _messages,
    "alpaca": _alpaca,
    "prompt": _prompt,
    "text": _plain,
}


def _text(value: Any, where: str) -> Text:
    text = _checked_text(value, "text")
    if not text.strip():
        raise RequestError("the text is empty")
    return Text(where, text)


def _checked_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r:.60}, expected text")
    return value


def _dialogue(raw: Any, tools: Any, where: str, form: str, dropped: int = 0) -> Dialogue:
    """A conversation from OpenAI's form: checked, and its tool use written out as the model was taught it."""
    if not isinstance(raw, list) or not raw:
        raise RequestError(f"messages is {raw!r:.60}, expected a list of messages")
    learned = []
    for number, message in enumerate(raw, 1):
        if not isinstance(message, Mapping) or "role" not in message:
            raise RequestError(f"message {number} is {message!r:.60}, expected an object with role and content")
        weight = message.get("weight", 1)
        if weight not in (0, 1):
            raise RequestError(f"message {number} has the weight {weight!r}, expected 0 or 1")
        learned.append(bool(weight))
    toolbox = Toolbox.of(tools=tools) if tools else Toolbox()
    talk = [ToolMessage.of(message) for message in raw]
    for number, said in enumerate(talk, 1):
        if said.role in ("user", "assistant") and not said.content.strip() and not said.calls:
            raise RequestError(f"message {number}, the {said.role}'s, is empty")
        if number > 1 and said.role == "system":
            raise RequestError(f"message {number} is a system message; it belongs at the start")
    if talk[-1].role != "assistant":
        raise RequestError(f"the last message is the {talk[-1].role}'s, so nothing follows it that could be learned")
    if toolbox or any(said.calls for said in talk):
        told = react_replies(talk, toolbox)
    else:  # calls that are written out in the text already, if there are any
        told = [([Message(said.role, said.content) for said in talk], 0)]
    messages, _ = told[-1]
    if len(messages) != len(talk):  # calls became messages of their own
        if not all(learned):
            raise RequestError("messages have weights beside several calls at once, which is not understood")
        learned = [True] * len(messages)
    parts = tuple(
        Dialogue(where, tuple(part), tuple(want and at >= first for at, want in enumerate(learned[: len(part)])), form)
        for part, first in told
    )
    if len(parts) == 1:
        return replace(parts[0], dropped=dropped)
    asked = max(index for index, said in enumerate(talk) if said.role == "user")
    prompt = react_messages(talk[: asked + 1], toolbox)
    whole = (*prompt, *messages[len(prompt) :])
    return Dialogue(where, whole, tuple(learned), form, dropped, parts)


# ----------------------------------------------------------------------------------------------------------- the files


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(line it begins on, parsed record) of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read {path} as UTF-8 text: {error}") from None
    if path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _json_line(line, path, number)
    elif path.suffix == ".json":
        yield from _json_list(text, path)
    elif text.strip():
        yield 1, text


def _json_line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number} is not JSON: {error}") from None


def _json_list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a list one by one, so that each has its line; a single object counts as a list of one."""
    decoder = json.JSONDecoder()
    at, line = _space(text, 0), 1
    line += text.count("\n", 0, at)
    listed = text[at : at + 1] == "["
    if listed:
        at = _space(text, at + 1)
    counted = 0
    while True:
        line += text.count("\n", counted, at)
        counted = at
        if listed and text[at : at + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise DataError(f"{path}:{line} is JSON that is nested too deeply") from None
        yield line, value
        at = _space(text, end)
        if not listed:
            if at < len(text):
                raise DataError(
                    f"{path}:{line + text.count(chr(10), counted, at)} has something after its first value",
                    hint="a file with a record a line is named .jsonl",
                )
            return
        if text[at : at + 1] == ",":
            at = _space(text, at + 1)
        elif text[at : at + 1] != "]":
            broken = line + text.count("\n", counted, at)
            raise DataError(f"{path}:{broken} is not JSON: expected a comma or the list's end after a record")


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
