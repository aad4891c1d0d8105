"""Conversations as files: out as JSON of our own or as Markdown, in from these and from other programs' JSON.

    text = to_json([store.tree(id)])
    imported = read(text, "backup.json")     # refuses with words, or
    store.adopt(imported.trees)

Our JSON is {"format": "qwenlet.conversations", "version": 1, "conversations": [...]} and holds whole trees; Markdown
holds the branch that is shown. `foreign` knows ChatGPT's export, OpenAI's messages and ShareGPT.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwenlet.errors import RequestError
from qwenlet.store import foreign, markdown
from qwenlet.store.parsed import Parsed, parse
from qwenlet.store.records import ROLES, Conversation, StoredMessage, Tree
from qwenlet.tools import ToolMessage

FORMAT, VERSION = "qwenlet.conversations", 1
_CONVERSATION = ("title", "model", "settings", "created", "updated", "current", "messages")
_MESSAGE = ("id", "parent", "role", "content", "created", "extra")

to_markdown = markdown.write


@dataclass(frozen=True)
class Imported:
    """What a file held.

    Attributes:
        source: the format that was recognised, in words.
        notes: what was left out, one sentence each.
    """

    source: str
    trees: tuple[Tree, ...]
    notes: tuple[str, ...] = ()


def to_json(trees: Iterable[Tree]) -> str:
    """A document that `read` gives back whole."""
    return json.dumps(to_document(trees), ensure_ascii=False, indent=1) + "\n"


def to_document(trees: Iterable[Tree]) -> dict[str, object]:
    """The same as an object."""
    return {"format": FORMAT, "version": VERSION, "conversations": [_written(tree) for tree in trees]}


def read(text: str, name: str = "the file") -> Imported:
    """Conversations out of a document; the store gives them ids of its own when it adopts them.

    Args:
        name: what errors call the document.
    Raises:
        RequestError: it is in no format we know, newer, or damaged; where and what, in words.
    """
    text = text.removeprefix("\ufeff")
    try:
        if markdown.is_ours(text):
            source, trees, notes = "our Markdown", markdown.read(text), foreign.Notes()
        else:
            source, trees, notes = _read_json(text)
        for tree in trees:
            check(tree)
    except RequestError as problem:
        raise RequestError(f"{name}: {problem.message}", problem.hint) from None
    except RecursionError:
        raise RequestError(f"{name}: is nested too deeply") from None
    if not trees:
        raise RequestError(f"{name} holds no conversations")
    return Imported(source, tuple(trees), notes.sentences)


def _read_json(text: str) -> tuple[str, list[Tree], foreign.Notes]:
    notes = foreign.Notes()
    documents = _documents(text)
    if len(documents) == 1 and _is_ours(document := documents[0]):
        return "our JSON", _read_ours(document), notes
    source, trees = foreign.read(documents, notes)
    return source, trees, notes


def _documents(text: str) -> list[Parsed]:
    """One JSON document, or one on each line."""
    try:
        return [parse(text)]
    except ValueError as problem:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) < 2 or not lines[0][1].lstrip().startswith(("{", "[")):
            raise RequestError(f"is neither JSON nor our Markdown: {problem}", hint=foreign.KNOWN) from None
        first = problem
    documents = []
    for number, line in lines:
        try:
            documents.append(Parsed(parse(line).value, f"line {number}"))
        except ValueError as problem:
            # a document over several lines that is broken somewhere, or lines of which one is
            said = f"line {number}: {problem}" if documents else str(first)
            raise RequestError(f"is not JSON: {said}", hint=foreign.KNOWN) from None
    return documents


def _is_ours(document: Parsed) -> bool:
    return document.is_object and document.value.get("format") == FORMAT


def _read_ours(document: Parsed) -> list[Tree]:
    version = document["version"].value
    if isinstance(version, int) and version > VERSION:
        raise RequestError(
            f"was written by a newer qwenlet: its version is {version}, and this one knows {VERSION}",
            hint="update qwenlet",
        )
    if version != VERSION or isinstance(version, bool):
        document["version"].refuse(str(VERSION))
    document.object("format", "version", "conversations")
    return [_read_conversation(one) for one in document["conversations"].items()]


def _read_conversation(one: Parsed) -> Tree:
    one.object(*_CONVERSATION)
    messages: dict[str, StoredMessage] = {}
    for item in one["messages"].items():
        item.object(*_MESSAGE)
        message = StoredMessage(
            item["id"].text(),
            "",
            _known(item["parent"], messages),
            item["role"].one_of(*ROLES),
            item["content"].text(),
            item["created"].seconds(0.0),
            item["extra"].object(),
        )
        if message.id in messages:
            item["id"].refuse("an id that no other message has")
        messages[message.id] = message
    created = one["created"].seconds(0.0)
    talk = Conversation(
        "",
        one["title"].text(),
        one["model"].text(),
        _known(one["current"], messages),
        created,
        one["updated"].seconds(created),
        one["settings"].object(),
    )
    return Tree(talk, tuple(messages.values()))


def _known(id: Parsed, messages: dict[str, StoredMessage]) -> str | None:
    if id.value is None:
        return None
    if not isinstance(id.value, str) or id.value not in messages:
        id.refuse("null or the id of a message before it")
    return str(id.value)


def _written(tree: Tree) -> dict[str, object]:
    talk = tree.conversation
    head = {name: getattr(talk, name) for name in _CONVERSATION if name != "messages"}
    return {**head, "messages": [{name: getattr(one, name) for name in _MESSAGE} for one in tree.messages]}


def check(tree: Tree) -> None:
    """Raises RequestError for what no model could be told."""
    where = f"the conversation {tree.conversation.title!r:.80}"
    Parsed(tree.conversation.settings.get("system"), f"{where}: the system prompt").text("")
    _check_text(tree.conversation.settings, where)
    for message in tree.messages:
        check_message(message, where)


def check_message(message: StoredMessage, where: str = "the message") -> None:
    """Raises RequestError for one that no model could be told."""
    _check_text(message.extra, where)
    told = message.as_told()
    for name, kind in (("tool_calls", list), ("tool_call_id", str), ("reasoning_content", str)):
        if not isinstance(told.get(name, kind()), kind):
            Parsed(told[name], f"{where}: {name}").refuse("a list" if kind is list else "text")
    try:
        ToolMessage.of(told)
    except RequestError as problem:
        raise RequestError(f"{where}: {problem.message}") from None


def _check_text(kept: Mapping[str, Any], where: str) -> None:
    try:
        json.dumps(dict(kept), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half a surrogate pair, which is no text") from None
