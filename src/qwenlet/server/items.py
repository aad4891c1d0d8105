"""Items of /v1/responses -> messages. Refuses by place what can't be read."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from qwenlet import chat
from qwenlet.server.errors import ApiError, refused
from qwenlet.server.nested import Fields, look
from qwenlet.tools import Call, ToolMessage

_TEXT = Fields.of("type text refusal")
# other kinds are refused
_ITEMS = {
    "message": Fields.of("type role id status", content=_TEXT),
    "reasoning": Fields.of("type id status", content=_TEXT),
    "function_call": Fields.of("type call_id name arguments id status"),
    "function_call_output": Fields.of("type call_id id status", output=_TEXT),
}
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def items_of(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """A request's input as items, each with an id."""
    if given is None:
        raise ApiError(400, "input is missing, expected text or items", param="input")
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    if not given:
        raise ApiError(400, "input is empty, expected one item or more", param="input")
    return [_with_id(item) for item in given]


def _with_id(item: dict[str, Any]) -> dict[str, Any]:
    item = {"type": "message"} | item
    if isinstance(item.get("content"), str) and item["type"] == "message":
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        item["content"] = [{"type": kind, "text": item["content"]}]
    if not item.get("id"):
        prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}.get(str(item["type"]), "item")
        item["id"] = f"{prefix}_{secrets.token_hex(24)}"
    return item


def name_unread(items: Sequence[Mapping[str, Any]], ignored: list[str]) -> None:
    """Puts the items' fields that have no effect among `ignored`; `id` and `status` are told back."""
    for number, item in enumerate(items):
        if (fields := _ITEMS.get(str(item["type"]))) is not None:
            look(item, fields, f"input[{number}]", ignored)


def conversation(items: Sequence[Mapping[str, Any]], field: str) -> list[ToolMessage]:
    """Calls that follow each other, and the text right before them, are one message of the assistant.

    Args:
        field: what errors call the list.
    """
    messages: list[ToolMessage] = []
    thought = ""
    for number, item in enumerate(items):
        place, kind = f"{field}[{number}]", item.get("type", "message")
        if kind == "message":
            messages.append(_message(item, place))
            thought = ""
        elif kind == "reasoning":  # what led to a call goes with it
            thought = _text(item.get("content") or (), f"{place}.content")
        elif kind == "function_call":
            call = Call(*(_string(item, name, place) for name in ("call_id", "name", "arguments")))
            before = messages[-1] if messages and messages[-1].role == "assistant" else None
            if before is None:
                messages.append(ToolMessage("assistant", "", (call,), thought))
            else:
                calls = (*before.calls, call)
                messages[-1] = ToolMessage("assistant", before.content, calls, before.thought or thought)
            thought = ""
        elif kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else _text(output, f"{place}.output")
            messages.append(ToolMessage("tool", text, call_id=_string(item, "call_id", place)))
        else:
            known = "message, function_call, function_call_output and reasoning"
            raise refused(f"{place}.type", f"is {kind!r:.80}; {known} are known, whole and not as a reference")
    return messages


def _message(item: Mapping[str, Any], place: str) -> ToolMessage:
    role: Any = {"developer": "system"}.get(str(item.get("role")), item.get("role"))
    if role not in chat.ROLES or role == "tool":
        raise ApiError(400, f"{place}.role is {role!r:.80}; user, assistant, system, developer are known", param=place)
    content = item.get("content")
    return ToolMessage(role, content if isinstance(content, str) else _text(content, f"{place}.content"))


def _text(parts: Any, place: str) -> str:
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise ApiError(400, f"{place} is {parts!r:.80}, expected text or a list of parts", param=place)
    texts = []
    for number, part in enumerate(parts):
        here = f"{place}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in (*_TEXTS, "refusal"):
            raise refused(f"{here}.type", f"is {kind!r:.80}, and the model reads text alone")
        texts.append(_string(part, "refusal" if kind == "refusal" else "text", here))
    return "".join(texts)


def _string(item: Mapping[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{place}.{name} is {value!r:.80}, expected text", param=f"{place}.{name}")
    return value
