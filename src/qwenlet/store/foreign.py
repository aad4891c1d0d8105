"""Other programs' conversations: ChatGPT's export, OpenAI's messages, ShareGPT; and the files of /save.

What has no place in a conversation here (pictures, a service's own tools) is left out and counted, so that it can be
said; what is damaged is refused by its place.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenlet.errors import RequestError
from qwenlet.store.conversations import title_of
from qwenlet.store.parsed import Parsed
from qwenlet.store.records import TOLD, Conversation, StoredMessage, Tree

KNOWN = "known are qwenlet's own export, ChatGPT's conversations.json, OpenAI's messages and ShareGPT"
_SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bard": "assistant", "bing": "assistant",
}  # fmt: skip
_OPENAI = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
           "function": "tool"}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")


class Notes:
    """Counts what was left out."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def left_out(self, what: str) -> None:
        self._counts[what] += 1

    @property
    def sentences(self) -> tuple[str, ...]:
        return tuple(f"left out: {count} × {what}" for what, count in self._counts.items())


def read(documents: Sequence[Parsed], notes: Notes) -> tuple[str, list[Tree]]:
    """The format in words, and the conversations. Raises RequestError for what is none of them."""
    (root, *more) = documents
    if not more and isinstance(root.value, list) and not _is_message(root):
        documents = root.items()
        if not documents:
            return "an empty list", []
    sources: dict[str, None] = {}
    trees: list[Tree] = []
    for document in documents:
        source, tree = _read_one(document, notes)
        sources[source] = None
        trees += [] if tree is None else [tree]
    return " and ".join(sources), trees


def _is_message(document: Parsed) -> bool:
    """Whether a list is one conversation rather than many."""
    first = Parsed(document.value[0]) if document.value else document
    return first.has("role") or first.has("from", "value")


def _read_one(document: Parsed, notes: Notes) -> tuple[str, Tree | None]:
    if document.has("mapping"):
        return "ChatGPT's export", _chatgpt(document, notes)
    if document.has("version", "system", "params", "messages"):
        return "a file of /save", _saved(document, notes)
    if document.has("messages"):
        return "OpenAI's messages", _openai(document, document["messages"], notes)
    if document.has("conversations"):
        return "ShareGPT", _sharegpt(document, document["conversations"])
    if isinstance(document.value, list) and document.value:
        if Parsed(document.value[0]).has("role"):
            return "OpenAI's messages", _openai(Parsed({}), document, notes)
        if Parsed(document.value[0]).has("from", "value"):
            return "ShareGPT", _sharegpt(Parsed({}), document)
    seen = f"an object with {', '.join(sorted(document.value)[:6]) or 'no fields'}" if document.is_object else None
    where = f"{document.place} is" if document.place else "holds"
    raise RequestError(
        f"{where} {seen or f'a JSON {type(document.value).__name__}'}, in which no conversation is known",
        hint=KNOWN,
    )


# ------------------------------------------------------------------------------------------------------- in a row


def _in_a_row(told: Sequence[tuple[str, str, Mapping[str, Any]]], title: str = "", model: str = "") -> Tree:
    """A tree of one branch, from (role, content, extra)."""
    now = time.time()
    messages = [
        StoredMessage(str(number), "", str(number - 1) if number else None, role, content, now, extra)
        for number, (role, content, extra) in enumerate(told)
    ]
    return _tree(messages, title, model, now, now, messages[-1].id if messages else None)


def _tree(
    messages: Sequence[StoredMessage], title: str, model: str, created: float, updated: float, current: str | None
) -> Tree:
    """A system message that leads every branch becomes the conversation's setting."""
    settings: dict[str, Any] = {}
    roots = [message for message in messages if message.parent is None]
    if len(roots) == 1 and roots[0].role == "system":
        first, settings = roots[0].id, {"system": roots[0].content}
        messages = [replace(one, parent=None) if one.parent == first else one for one in messages if one.id != first]
        current = None if current == first else current
    title = title or title_of(next((one.content for one in messages if one.role == "user"), ""))
    return Tree(Conversation("", title, model, current, created, updated, settings), tuple(messages))


def _openai(whole: Parsed, messages: Parsed, notes: Notes) -> Tree:
    """A list of {"role", "content"}, alone or in a request; content is text, parts or null beside tool calls."""
    told = []
    for item in messages.items():
        role = _OPENAI[item["role"].one_of(*_OPENAI)]
        extra = {name: item.value[name] for name in TOLD if item.value.get(name) is not None}
        if item.has("function_call") and item["function_call"].value is not None:
            extra["tool_calls"] = [{"id": "", "type": "function", "function": item["function_call"].value}]
        if isinstance(calls := extra.get("tool_calls"), list):
            extra["tool_calls"] = [_bare(call) for call in calls]
        told.append((role, _parts(item["content"], notes), extra))
    if not told:
        messages.refuse("one message or more")
    title, model = (whole[name].value for name in ("title", "model"))
    return _in_a_row(told, title if isinstance(title, str) else "", model if isinstance(model, str) else "")


def _bare(call: Any) -> Any:
    """A call without what other programs add to one; what is none is left as it is, to be refused."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    called = {name: function[name] for name in ("name", "arguments") if name in function}
    return {"id": call.get("id", ""), "type": "function", "function": called}


def _parts(content: Parsed, notes: Notes) -> str:
    if content.value is None or isinstance(content.value, str):
        return content.text("")
    texts = []
    for part in content.items():
        if isinstance(part.value, str):
            texts.append(part.text())
        elif part["type"].value in _TEXT_PARTS:
            texts.append(part["text"].text())
        else:
            notes.left_out(f"content of the type {part['type'].value!r:.40}")
    return "\n".join(texts)


def _sharegpt(whole: Parsed, turns: Parsed) -> Tree:
    """{"conversations": [{"from": "human", "value": ...}, ...]}, with or without a system prompt beside."""
    told: list[tuple[str, str, Mapping[str, Any]]] = [
        (_SHAREGPT[turn["from"].one_of(*_SHAREGPT)], turn["value"].text(), {}) for turn in turns.items()
    ]
    if not told:
        turns.refuse("one turn or more")
    if whole.has("system") and whole["system"].text("") and told[0][0] != "system":
        told.insert(0, ("system", whole["system"].text(), {}))
    return _in_a_row(told)


def _saved(whole: Parsed, notes: Notes) -> Tree:
    """What the terminal's /save writes."""
    if whole["version"].value != 1:
        whole["version"].refuse("1")
    tree = _openai(whole, whole["messages"], notes) if whole["messages"].value else _in_a_row([])
    ends = [item["finish_reason"].value for item in whole["messages"].items()]
    messages = tuple(
        replace(one, extra={**one.extra, "finish_reason": end}) if end is not None else one
        for one, end in zip(tree.messages, ends, strict=True)
    )
    settings = {"system": whole["system"].text(""), "sampling": whole["params"].object()}
    talk = replace(tree.conversation, model=whole["model"].text(""), settings=settings)
    return Tree(talk, messages)


# ------------------------------------------------------------------------------------------------------- ChatGPT


def _chatgpt(whole: Parsed, notes: Notes) -> Tree | None:
    """{"title", "create_time", "mapping": {id: {"parent", "message"}}, "current_node"}: a tree, much of it hidden."""
    created = whole["create_time"].seconds(time.time())
    nodes = dict(whole["mapping"].fields())
    children: dict[str | None, list[str]] = {}
    for id, node in nodes.items():
        parent = node["parent"].value
        known = isinstance(parent, str) and parent in nodes
        children.setdefault(parent if known else None, []).append(id)
    kept: dict[str, StoredMessage] = {}
    nearest: dict[str | None, str | None] = {None: None}  # the kept message at or above a node
    left: list[tuple[str, str | None]] = [(id, None) for id in reversed(children.get(None, []))]
    while left:
        id, above = left.pop()
        message = _chatgpt_message(id, nearest[above], nodes[id]["message"], created, notes)
        nearest[id] = nearest[above] if message is None else id
        if message is not None:
            kept[id] = message
        left += [(child, id) for child in reversed(children.get(id, []))]
    if len(nearest) - 1 < len(nodes):
        raise RequestError(f"{whole['mapping'].place} holds messages that follow themselves")
    if not kept:
        notes.left_out("conversation without any text")
        return None
    # siblings by age, so that the newest branch is the last; parents stay before children
    order = sorted(kept.values(), key=lambda one: one.created)
    placed = _parents_first(order)
    named = whole["current_node"].value
    current = nearest.get(named) if isinstance(named, str) and named in nodes else placed[-1].id
    updated = whole["update_time"].seconds(created)
    return _tree(placed, whole["title"].text(""), "", created, updated, current)


def _parents_first(messages: Sequence[StoredMessage]) -> list[StoredMessage]:
    children: dict[str | None, list[StoredMessage]] = {}
    for message in messages:
        children.setdefault(message.parent, []).append(message)
    placed: list[StoredMessage] = []
    left = list(reversed(children.get(None, [])))
    while left:
        placed.append(left.pop())
        left += reversed(children.get(placed[-1].id, []))
    return placed


def _chatgpt_message(
    id: str, parent: str | None, message: Parsed, created: float, notes: Notes
) -> StoredMessage | None:
    """None for what is empty, or has no place here."""
    if message.value is None:
        return None
    role, content = message["author"]["role"].text(), message["content"]
    kind = content["content_type"].text("text")
    if role not in ("system", "user", "assistant") or message["recipient"].value not in (None, "all"):
        notes.left_out("call or result of one of ChatGPT's tools")
        return None
    if kind not in ("text", "multimodal_text", "code"):
        notes.left_out(f"content of the type {kind!r:.40}")
        return None
    text = content["text"].text("") if kind == "code" else _parts_of_chatgpt(content["parts"], notes)
    if not text.strip():
        return None
    return StoredMessage(id, "", parent, role, text, message["create_time"].seconds(created))


def _parts_of_chatgpt(parts: Parsed, notes: Notes) -> str:
    texts = []
    for part in parts.items() if parts.value is not None else []:
        if isinstance(part.value, str):
            texts.append(part.text())
        else:
            notes.left_out("picture, sound or file")
    return "\n".join(text for text in texts if text)
