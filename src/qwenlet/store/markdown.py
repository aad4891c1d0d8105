"""A conversation as Markdown, to read and to read back: the branch that is shown, without its other branches.

Comments that Markdown does not show say what each part is; a line of somebody's text that looks like one gets a
backslash, which is taken away on the way back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwenlet.errors import RequestError
from qwenlet.store.parsed import Parsed, parse
from qwenlet.store.records import ROLES, TOLD, Conversation, StoredMessage, Tree

VERSION = 1
_HEAD, _MESSAGE = "qwenlet conversation", "message"
_MARK = re.compile(rf"<!-- ({_HEAD}|{_MESSAGE}) (\{{.*\}}) -->\r?", re.ASCII)
_LOOKS_LIKE_MARK = re.compile(rf"^(?=\\*<!-- (?:{_HEAD}|{_MESSAGE}) )", re.MULTILINE)
_ESCAPED_MARK = re.compile(rf"^\\(?=\\*<!-- (?:{_HEAD}|{_MESSAGE}) )", re.MULTILINE)


def is_ours(text: str) -> bool:
    return text.startswith(f"<!-- {_HEAD} ")


def write(tree: Tree) -> str:
    """Text that `read` gives back."""
    talk = tree.conversation
    head = {"version": VERSION, "title": talk.title, "model": talk.model, "settings": talk.settings,
            "created": talk.created, "updated": talk.updated}  # fmt: skip
    parts = [f"{_mark(_HEAD, head)}\n# {_one_line(talk.title) or 'Conversation'}\n\n"]
    for message in tree.path:
        told = {name: message.extra[name] for name in (*TOLD, "finish_reason") if name in message.extra}
        mark = _mark(_MESSAGE, {"role": message.role, "created": message.created, **told})
        content = _LOOKS_LIKE_MARK.sub(lambda _: "\\", message.content)
        parts.append(f"{mark}\n## {_heading(message)}\n\n{content}\n\n")
    return "".join(parts)


def read(text: str) -> list[Tree]:
    """Raises RequestError for what `write` didn't write."""
    trees: list[tuple[Conversation, list[StoredMessage]]] = []
    for kind, fields, body in _sections(text):
        if kind == _HEAD:
            trees.append((_conversation(fields), []))
        else:
            messages = trees[-1][1]
            messages.append(_message(fields, body, len(messages)))
    return [
        Tree(replace(talk, current=messages[-1].id if messages else None), tuple(messages)) for talk, messages in trees
    ]


def _sections(text: str) -> list[tuple[str, Parsed, str]]:
    """(kind, fields, text below) of each mark."""
    sections: list[tuple[str, Parsed, list[str]]] = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        match = _MARK.fullmatch(line)
        if match is None:
            if not sections:
                raise RequestError("line 1 is damaged: it should say what the conversation is")
            sections[-1][2].append(line)
            continue
        try:
            fields = Parsed(parse(match[2]).value, f"line {number}")
        except (ValueError, RecursionError) as problem:
            raise RequestError(f"line {number} is damaged: {problem}") from None
        sections.append((match[1], fields, []))
    if sections[0][0] != _HEAD:
        raise RequestError("line 1 is damaged: it should say what the conversation is")
    return [(kind, fields, "\n".join(lines)) for kind, fields, lines in sections]


def _conversation(fields: Parsed) -> Conversation:
    if fields["version"].value != VERSION:
        fields["version"].refuse(f"{VERSION}, which is what this qwenlet knows")
    fields.object("version", "title", "model", "settings", "created", "updated")
    created = fields["created"].seconds(0.0)
    return Conversation(
        "", fields["title"].text(), fields["model"].text(), None, created, fields["updated"].seconds(created),
        fields["settings"].object(),
    )  # fmt: skip


def _message(fields: Parsed, body: str, number: int) -> StoredMessage:
    fields.object("role", "created", "finish_reason", *TOLD)
    heading, newline, rest = body.partition("\n")
    if heading.startswith("## ") and newline:
        body = rest
    # one empty line on either side belongs to the layout
    content = _ESCAPED_MARK.sub("", body.removeprefix("\n").removesuffix("\n"))
    extra = {name: value for name, value in fields.value.items() if name not in ("role", "created")}
    parent = str(number - 1) if number else None
    role, created = fields["role"].one_of(*ROLES), fields["created"].seconds(0.0)
    return StoredMessage(str(number), "", parent, role, content, created, extra)


def _mark(kind: str, fields: Mapping[str, Any]) -> str:
    # two hyphens would end the comment
    return f"<!-- {kind} {json.dumps(fields, ensure_ascii=True).replace('--', '-' + chr(92) + 'u002d')} -->"


def _heading(message: StoredMessage) -> str:
    calls = [call.get("function", {}) for call in message.extra.get("tool_calls") or ()]
    called = ", ".join(f"{call.get('name')}({call.get('arguments', '')})" for call in calls)
    return message.role.capitalize() + (f", calling {_one_line(called)}" if called else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
