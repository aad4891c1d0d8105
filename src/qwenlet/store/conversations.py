"""Conversations: trees of messages with one current branch each, and the search through them."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qwenlet.errors import NotStoredError, StoreError
from qwenlet.store.database import Database, as_json
from qwenlet.store.records import Conversation, Found, StoredMessage, Tree

_SEARCHABLE = 3  # characters that the index of trigrams needs; shorter words are looked for one by one
_TITLE = 60  # characters of a title that is made of a question
_AROUND = 40  # characters that an excerpt shows on either side of a word

_KIND = "conv_"
_CONVERSATION = "id, title, model, current, created, updated, settings"
_MESSAGE = "id, conversation, parent, role, content, created, extra"
_ADD_CONVERSATION = f"INSERT INTO conversations ({_CONVERSATION}) VALUES (?, ?, ?, ?, ?, ?, ?)"
_ADD_MESSAGE = f"INSERT INTO messages ({_MESSAGE}) VALUES (?, ?, ?, ?, ?, ?, ?)"


class Conversations(Database):
    """The part of the store that keeps conversations."""

    def new_conversation(
        self, title: str = "", model: str = "", settings: Mapping[str, Any] | None = None
    ) -> Conversation:
        """An empty conversation; without a title the first question becomes it."""
        now = time.time()
        made = Conversation(_new_id(_KIND), title, model, None, now, now, dict(settings or {}))
        with self._write() as db:
            db.execute(_ADD_CONVERSATION, _conversation_row(made))
        return made

    def conversations(self, limit: int = 100, offset: int = 0) -> list[Conversation]:
        """Those changed last come first."""
        rows = self._read(
            f"SELECT {_CONVERSATION} FROM conversations ORDER BY updated DESC, rowid DESC LIMIT ? OFFSET ?",
            limit,
            offset,
        )
        return [_conversation(row) for row in rows]

    def conversation(self, id: str) -> Conversation:
        rows = self._read(f"SELECT {_CONVERSATION} FROM conversations WHERE id = ?", id)
        if not rows:
            raise _no_conversation(id)
        return _conversation(rows[0])

    def find(self, start: str) -> Conversation:
        """The conversation whose id begins so, with or without what all ids begin with. Raises StoreError for none or
        several."""
        start = start.removeprefix(_KIND)
        rows = self._read(
            f"SELECT {_CONVERSATION} FROM conversations WHERE substr(id, 1, ?) = ? ORDER BY updated DESC LIMIT 2",
            len(_KIND + start),
            _KIND + start,
        )
        if not rows or not start:
            raise _no_conversation(start)
        if len(rows) > 1:
            raise StoreError(f"several conversations have an id that begins with {start!r}", hint="give more of it")
        return _conversation(rows[0])

    def tree(self, id: str) -> Tree:
        """A conversation and its messages as they are at one moment."""
        with self._snapshot():
            return Tree(self.conversation(id), tuple(self.messages(id)))

    def rename(self, id: str, title: str) -> None:
        with self._write() as db:
            if not db.execute("UPDATE conversations SET title = ? WHERE id = ?", (title, id)).rowcount:
                raise _no_conversation(id)

    def set_settings(self, id: str, settings: Mapping[str, Any]) -> None:
        """Replaces a conversation's settings; `Conversation` says what they hold."""
        with self._write() as db:
            if not db.execute("UPDATE conversations SET settings = ? WHERE id = ?", (as_json(settings), id)).rowcount:
                raise _no_conversation(id)

    def delete(self, id: str) -> None:
        """Removes a conversation and its messages."""
        with self._write() as db:
            # children first: SQLite's own cascade goes no deeper than a thousand messages
            db.execute("UPDATE messages SET parent = NULL WHERE conversation = ?", (id,))
            if not db.execute("DELETE FROM conversations WHERE id = ?", (id,)).rowcount:
                raise _no_conversation(id)

    def adopt(self, trees: Iterable[Tree]) -> list[Conversation]:
        """Keeps conversations that come from elsewhere, all or none, each under a new id."""
        with self._write() as db:
            return [_adopt(db, tree) for tree in trees]

    # ---------------------------------------------------------------------------------------------- messages

    def append(
        self, conversation: str, role: str, content: str, extra: Mapping[str, Any] | None = None
    ) -> StoredMessage:
        """A message at the end of the current branch."""
        with self._write() as db:
            return self._add(db, conversation, self.conversation(conversation).current, role, content, extra)

    def add(
        self, conversation: str, parent: str | None, role: str, content: str, extra: Mapping[str, Any] | None = None
    ) -> StoredMessage:
        """A message behind `parent`, which may have others already; its branch becomes the current one."""
        with self._write() as db:
            self._check_place(conversation, parent)
            return self._add(db, conversation, parent, role, content, extra)

    def branch(self, message: str, content: str, extra: Mapping[str, Any] | None = None) -> StoredMessage:
        """An edited copy beside a message; what followed the old one stays on the old branch."""
        old = self.message(message)
        return self.add(old.conversation, old.parent, old.role, content, extra)

    def update(self, message: str, content: str, extra: Mapping[str, Any] | None = None) -> None:
        """Changes a message in place, such as a reply that goes on; `extra=None` leaves that as it is."""
        with self._write() as db:
            old = self.message(message)
            kept = old.extra if extra is None else extra
            db.execute("UPDATE messages SET content = ?, extra = ? WHERE id = ?", (content, as_json(kept), message))
            db.execute("UPDATE conversations SET updated = ? WHERE id = ?", (time.time(), old.conversation))

    def select(self, message: str) -> StoredMessage:
        """Makes the branch through a message the current one, down to its newest leaf, which is returned."""
        with self._write() as db:
            leaf = self.message(message)
            while rows := db.execute(
                "SELECT id FROM messages WHERE parent = ? ORDER BY number DESC LIMIT 1", (leaf.id,)
            ).fetchall():
                leaf = self.message(rows[0][0])
            db.execute("UPDATE conversations SET current = ? WHERE id = ?", (leaf.id, leaf.conversation))
        return leaf

    def go_back(self, conversation: str, message: str | None) -> None:
        """Ends the current branch at a message, or before the first; what follows it stays, on a branch of its own."""
        with self._write() as db:
            self._check_place(conversation, message)
            if not db.execute("UPDATE conversations SET current = ? WHERE id = ?", (message, conversation)).rowcount:
                raise _no_conversation(conversation)

    def message(self, id: str) -> StoredMessage:
        rows = self._read(f"SELECT {_MESSAGE} FROM messages WHERE id = ?", id)
        if not rows:
            raise NotStoredError(f"there is no message {id!r:.80}")
        return _message(rows[0])

    def messages(self, conversation: str) -> list[StoredMessage]:
        """The whole tree, in the order it was written, so that parents come before children."""
        self.conversation(conversation)
        rows = self._read(f"SELECT {_MESSAGE} FROM messages WHERE conversation = ? ORDER BY number", conversation)
        return [_message(row) for row in rows]

    def path(self, conversation: str) -> list[StoredMessage]:
        """The current branch, from its first message to its leaf."""
        return self.tree(conversation).path

    # ---------------------------------------------------------------------------------------------- search

    def search(self, text: str, limit: int = 50) -> list[Found]:
        """Conversations with every word of `text` in the title, then messages; newest first, letter case is ignored."""
        words = text.replace("\0", " ").split()  # SQLite would read no further
        if not words:
            return []
        title = " AND ".join(["title LIKE ? ESCAPE '\\'"] * len(words))
        rows = self._read(
            f"SELECT {_CONVERSATION} FROM conversations WHERE {title} ORDER BY updated DESC LIMIT ?",
            *map(_like, words),
            limit,
        )
        found = [Found(talk, None, talk.title) for talk in map(_conversation, rows)]
        long = [word for word in words if len(word) >= _SEARCHABLE]
        short = [word for word in words if len(word) < _SEARCHABLE]
        conditions = ["number IN (SELECT rowid FROM found WHERE found MATCH ?)"] if long else []
        conditions += ["content LIKE ? ESCAPE '\\'"] * len(short)
        match = [" AND ".join('"' + word.replace('"', '""') + '"' for word in long)] if long else []
        rows = self._read(
            f"SELECT {_MESSAGE} FROM messages WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT ?",
            *match, *map(_like, short), limit - len(found),
        )  # fmt: skip
        talks: dict[str, Conversation] = {}
        for row in rows:
            message = _message(row)
            talk = talks.setdefault(message.conversation, self.conversation(message.conversation))
            found.append(Found(talk, message, _excerpt(message.content, words)))
        return found

    # ---------------------------------------------------------------------------------------------- within

    def _add(
        self,
        db: sqlite3.Connection,
        conversation: str,
        parent: str | None,
        role: str,
        content: str,
        extra: Mapping[str, Any] | None,
    ) -> StoredMessage:
        talk = self.conversation(conversation)
        made = StoredMessage(_new_id("msg_"), conversation, parent, role, content, time.time(), dict(extra or {}))
        db.execute(_ADD_MESSAGE, _message_row(made))
        title = talk.title or (title_of(content) if role == "user" else "")
        db.execute(
            "UPDATE conversations SET current = ?, updated = ?, title = ? WHERE id = ?",
            (made.id, made.created, title, conversation),
        )
        return made

    def _check_place(self, conversation: str, message: str | None) -> None:
        if message is not None and self.message(message).conversation != conversation:
            raise StoreError(f"the message {message!r} belongs to another conversation")


def title_of(question: str) -> str:
    """A title made of a question: its first line with words in it, cut where it is long."""
    line = next((" ".join(line.split()) for line in question.splitlines() if line.strip()), "")
    return line if len(line) <= _TITLE else line[: _TITLE - 1].rstrip() + "…"


def _adopt(db: sqlite3.Connection, tree: Tree) -> Conversation:
    talk = tree.conversation
    ids = {message.id: _new_id("msg_") for message in tree.messages}
    current = None if talk.current is None else ids[talk.current]
    made = replace(talk, id=_new_id(_KIND), current=current)
    db.execute(_ADD_CONVERSATION, _conversation_row(made))
    for message in tree.messages:
        parent = None if message.parent is None else ids[message.parent]
        own = replace(message, id=ids[message.id], conversation=made.id, parent=parent)
        db.execute(_ADD_MESSAGE, _message_row(own))
    return made


def _conversation(row: tuple[Any, ...]) -> Conversation:
    id, title, model, current, created, updated, settings = row
    return Conversation(id, title, model, current, created, updated, json.loads(settings))


def _conversation_row(one: Conversation) -> tuple[Any, ...]:
    return (one.id, one.title, one.model, one.current, one.created, one.updated, as_json(one.settings))


def _message(row: tuple[Any, ...]) -> StoredMessage:
    id, conversation, parent, role, content, created, extra = row
    return StoredMessage(id, conversation, parent, role, content, created, json.loads(extra))


def _message_row(one: StoredMessage) -> tuple[Any, ...]:
    return (one.id, one.conversation, one.parent, one.role, one.content, one.created, as_json(one.extra))


def _no_conversation(id: str) -> NotStoredError:
    return NotStoredError(f"there is no conversation {id!r:.80}")


def _like(word: str) -> str:
    for sign in "\\%_":
        word = word.replace(sign, "\\" + sign)
    return f"%{word}%"


def _excerpt(content: str, words: list[str]) -> str:
    """One line around the first word that is there as it was typed, or in another letter case."""
    lower = content.lower()
    # lower case may be longer than the text it is of; then the place is near enough
    place = min((at for word in words if (at := lower.find(word.lower())) >= 0), default=0)
    start, end = max(place - _AROUND, 0), place + _AROUND
    line = " ".join(content[start:end].split())
    return ("…" if start else "") + line + ("…" if end < len(content) else "")


def _new_id(kind: str) -> str:
    return f"{kind}{secrets.token_hex(12)}"
