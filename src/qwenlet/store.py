"""Conversations and responses in one SQLite file, for the server, its page and the command line. No torch in here.

    with Store.open() as store:
        talk = store.new_conversation(model="demo")
        question = store.append(talk.id, "user", "What is the capital of France?")
        store.append(talk.id, "assistant", "Paris.")
        store.branch(question.id, "And of Italy?")      # edits by a sibling; the old branch stays
        [message.content for message in store.path(talk.id)]  # ["And of Italy?"]

A conversation is a tree of messages with one current leaf; `path` is the branch that ends there. Any thread and several
processes may use one file: it is in WAL mode, and every change is a transaction of its own. A file that is damaged,
foreign or newer is refused and left as it is. Only its owner may read it.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import platformdirs

from qwenlet.errors import StoreError

_APPLICATION_ID = 0x51574C54  # "QWLT"
_LOCK_SECONDS = 10.0
_FILE = "history.sqlite3"
_SEARCHABLE = 3  # characters that the index of trigrams needs; shorter words are looked for one by one

# Each entry brings a file from the version of its index to the next. Entries are only ever added.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversations (
            id TEXT PRIMARY KEY, title TEXT NOT NULL, model TEXT NOT NULL, current TEXT,
            created REAL NOT NULL, updated REAL NOT NULL)""",
        "CREATE INDEX conversations_updated ON conversations (updated)",
        """CREATE TABLE messages (
            number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
            conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            parent TEXT REFERENCES messages (id) ON DELETE CASCADE, role TEXT NOT NULL, content TEXT NOT NULL,
            extra TEXT NOT NULL, created REAL NOT NULL)""",
        "CREATE INDEX messages_conversation ON messages (conversation)",
        "CREATE INDEX messages_parent ON messages (parent)",
        # trigrams find parts of words, and words of a script that writes no spaces
        "CREATE VIRTUAL TABLE found USING fts5 (content, content=messages, content_rowid=number, tokenize=trigram)",
        """CREATE TRIGGER messages_added AFTER INSERT ON messages BEGIN
            INSERT INTO found (rowid, content) VALUES (new.number, new.content); END""",
        """CREATE TRIGGER messages_removed AFTER DELETE ON messages BEGIN
            INSERT INTO found (found, rowid, content) VALUES ('delete', old.number, old.content); END""",
        """CREATE TRIGGER messages_changed AFTER UPDATE OF content ON messages BEGIN
            INSERT INTO found (found, rowid, content) VALUES ('delete', old.number, old.content);
            INSERT INTO found (rowid, content) VALUES (new.number, new.content); END""",
        """CREATE TABLE responses (
            id TEXT PRIMARY KEY, previous TEXT, body TEXT NOT NULL, input TEXT NOT NULL, created REAL NOT NULL)""",
        "CREATE INDEX responses_created ON responses (created)",
    ),
    ("ALTER TABLE responses ADD COLUMN owner TEXT NOT NULL DEFAULT ''",),
)
SCHEMA_VERSION = len(_MIGRATIONS)


def data_dir() -> Path:
    """Where what users made is kept: QWENLET_DATA, or the user's data folder."""
    named = os.environ.get("QWENLET_DATA")
    return Path(named).expanduser() if named else platformdirs.user_data_path("qwenlet", appauthor=False)


@dataclass(frozen=True)
class Conversation:
    """Attributes: times are seconds since 1970; `current` is the leaf of the branch that is shown, None while empty."""

    id: str
    title: str
    model: str
    current: str | None
    created: float
    updated: float


@dataclass(frozen=True)
class StoredMessage:
    """One message in the tree of its conversation.

    Attributes:
        parent: the message it follows; None: it is a first one.
        extra: what else is kept with it, as JSON: tool calls, sampling settings, timings.
    """

    id: str
    conversation: str
    parent: str | None
    role: str
    content: str
    created: float
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A place that a search found; `message` is None where the title was it."""

    conversation: Conversation
    message: StoredMessage | None


@dataclass(frozen=True)
class StoredResponse:
    """A response of /v1/responses: its object as sent, and the input items that led to it, without earlier ones."""

    id: str
    previous: str | None
    body: Mapping[str, Any]
    input: tuple[Mapping[str, Any], ...]
    created: float


class Store:
    """An open file. Methods raise StoreError where it can't be read or written, or what is named isn't there."""

    def __init__(self, file: Path, connection: sqlite3.Connection) -> None:
        self.file = file
        self._connection = connection
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path | str | None = None) -> Store:
        """Opens the file, or makes it, and brings an older one up to date.

        Args:
            path: None: `history.sqlite3` in `data_dir()`.
        Raises:
            StoreError: it is damaged, no file of qwenlet's, newer than this version, or can't be written.
        """
        where = data_dir() / _FILE if path is None else Path(path)
        with _words(where):
            where.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(where, os.O_RDWR | os.O_CREAT, 0o600))
            new = _check_header(where)
            connection = sqlite3.connect(where, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                _prepare(where, connection, new)
                where.chmod(0o600)
            except BaseException:
                connection.close()
                raise
        return cls(where, connection)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- conversations

    def new_conversation(self, title: str = "", model: str = "") -> Conversation:
        now = time.time()
        made = Conversation(_new_id("conv"), title, model, None, now, now)
        with self._write() as db:
            db.execute(
                "INSERT INTO conversations VALUES (:id, :title, :model, :current, :created, :updated)", asdict(made)
            )
        return made

    def conversations(self, limit: int = 100, offset: int = 0) -> list[Conversation]:
        """Those changed last come first."""
        rows = self._read(
            "SELECT * FROM conversations ORDER BY updated DESC, rowid DESC LIMIT ? OFFSET ?", limit, offset
        )
        return [Conversation(*row) for row in rows]

    def conversation(self, id: str) -> Conversation:
        rows = self._read("SELECT * FROM conversations WHERE id = ?", id)
        if not rows:
            raise StoreError(f"there is no conversation {id!r}")
        return Conversation(*rows[0])

    def rename(self, id: str, title: str) -> None:
        self.conversation(id)
        with self._write() as db:
            db.execute("UPDATE conversations SET title = ? WHERE id = ?", (title, id))

    def delete(self, id: str) -> None:
        """Removes a conversation and its messages."""
        self.conversation(id)
        with self._write() as db:
            db.execute("DELETE FROM conversations WHERE id = ?", (id,))

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
            if parent is not None and self.message(parent).conversation != conversation:
                raise StoreError(f"the message {parent!r} belongs to another conversation")
            return self._add(db, conversation, parent, role, content, extra)

    def branch(self, message: str, content: str, extra: Mapping[str, Any] | None = None) -> StoredMessage:
        """An edited copy beside a message; what followed the old one stays on the old branch."""
        old = self.message(message)
        return self.add(old.conversation, old.parent, old.role, content, extra)

    def update(self, message: str, content: str, extra: Mapping[str, Any] | None = None) -> None:
        """Changes a message in place, such as a reply that goes on; `extra=None` leaves that as it is."""
        old = self.message(message)
        kept = dict(old.extra) if extra is None else dict(extra)
        with self._write() as db:
            db.execute("UPDATE messages SET content = ?, extra = ? WHERE id = ?", (content, _json(kept), message))
            db.execute("UPDATE conversations SET updated = ? WHERE id = ?", (time.time(), old.conversation))

    def select(self, message: str) -> StoredMessage:
        """Makes the branch through a message the current one, down to its newest leaf, which is returned."""
        leaf = self.message(message)
        with self._write() as db:
            while rows := db.execute(
                "SELECT id FROM messages WHERE parent = ? ORDER BY number DESC LIMIT 1", (leaf.id,)
            ).fetchall():
                leaf = self.message(rows[0][0])
            db.execute("UPDATE conversations SET current = ? WHERE id = ?", (leaf.id, leaf.conversation))
        return leaf

    def message(self, id: str) -> StoredMessage:
        rows = self._read(f"SELECT {_MESSAGE} FROM messages WHERE id = ?", id)
        if not rows:
            raise StoreError(f"there is no message {id!r}")
        return _message(rows[0])

    def messages(self, conversation: str) -> list[StoredMessage]:
        """The whole tree, in the order it was written, so that parents come before children."""
        self.conversation(conversation)
        rows = self._read(f"SELECT {_MESSAGE} FROM messages WHERE conversation = ? ORDER BY number", conversation)
        return [_message(row) for row in rows]

    def path(self, conversation: str) -> list[StoredMessage]:
        """The current branch, from its first message to its leaf."""
        with self._lock:
            current = self.conversation(conversation).current
            known = {message.id: message for message in self.messages(conversation)}
        path: list[StoredMessage] = []
        while current is not None:
            path.append(known[current])
            current = known[current].parent
        return path[::-1]

    def search(self, text: str, limit: int = 50) -> list[Found]:
        """Conversations with every word of `text` in the title, then messages; newest first, letter case is ignored."""
        words = text.replace("\0", " ").split()  # SQLite would read no further
        if not words:
            return []
        title = " AND ".join(["title LIKE ? ESCAPE '\\'"] * len(words))
        rows = self._read(
            f"SELECT * FROM conversations WHERE {title} ORDER BY updated DESC LIMIT ?", *map(_like, words), limit
        )
        found = [Found(Conversation(*row), None) for row in rows]
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
            found.append(Found(talk, message))
        return found

    # ---------------------------------------------------------------------------------------------- responses

    def save_response(
        self,
        id: str,
        body: Mapping[str, Any],
        input: tuple[Mapping[str, Any], ...] = (),
        previous: str | None = None,
        *,
        owner: str = "",
    ) -> None:
        """Keeps a response, or replaces what was kept of it. Nobody but `owner` finds it again."""
        with self._write() as db:
            db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET body = excluded.body WHERE owner = excluded.owner",
                (id, previous, _json(body), _json(list(input)), time.time(), owner),
            )

    def response(self, id: str, *, owner: str = "") -> StoredResponse | None:
        query = "SELECT id, previous, body, input, created FROM responses WHERE id = ? AND owner = ?"
        rows = self._read(query, id, owner)
        if not rows:
            return None
        name, previous, body, items, created = rows[0]
        return StoredResponse(name, previous, json.loads(body), tuple(json.loads(items)), created)

    def delete_response(self, id: str, *, owner: str = "") -> bool:
        """Whether it was there."""
        with self._write() as db:
            return db.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (id, owner)).rowcount > 0

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
        self.conversation(conversation)
        made = StoredMessage(_new_id("msg"), conversation, parent, role, content, time.time(), dict(extra or {}))
        db.execute(
            f"INSERT INTO messages ({_MESSAGE}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (made.id, conversation, parent, role, content, made.created, _json(made.extra)),
        )
        db.execute(
            "UPDATE conversations SET current = ?, updated = ? WHERE id = ?", (made.id, made.created, conversation)
        )
        return made

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, _words(self.file):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _words(self.file), _transaction(self._connection):
            yield self._connection


_MESSAGE = "id, conversation, parent, role, content, created, extra"


def _message(row: tuple[Any, ...]) -> StoredMessage:
    id, conversation, parent, role, content, created, extra = row
    return StoredMessage(id, conversation, parent, role, content, created, json.loads(extra))


def _json(value: Any) -> str:
    try:
        return json.dumps(dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"what is to be kept is not JSON: {error}") from None


def _like(word: str) -> str:
    for sign in "\\%_":
        word = word.replace(sign, "\\" + sign)
    return f"%{word}%"


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; the lock for writing is taken at once, so what is read inside can't change before a write."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def _words(path: Path) -> Iterator[None]:
    """Makes words of what SQLite and the system say."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreError(
                f"{path} is locked by another process for more than {_LOCK_SECONDS:.0f} s",
                hint="close it and try again",
            ) from error
        raise StoreError(
            f"{path} can't be used: {error}", hint="see its permissions and the room on its disk"
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error
    except sqlite3.ProgrammingError as error:  # a closed connection
        raise StoreError(f"{path} can't be used: {error}") from error
    except UnicodeEncodeError as error:
        raise StoreError(f"what is to be kept holds half a surrogate pair at character {error.start}") from None
    except OSError as error:
        raise StoreError(
            f"{path} can't be used: {error.strerror or error}", hint="QWENLET_DATA names another folder"
        ) from error


def _damaged(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"{path} is damaged, or not a database: {reason}",
        hint="it was left as it is; move it away to start anew, or QWENLET_DATA names another folder",
    )


def _check_header(path: Path) -> bool:
    """Whether the file is new. Looks at its first bytes alone, for SQLite may write when it opens a file."""
    with path.open("rb") as file:
        header = file.read(100)
    if not header:
        return True
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise _damaged(path, "its first bytes are not SQLite's")
    version, application = struct.unpack(">I", header[60:64])[0], struct.unpack(">I", header[68:72])[0]
    if application != _APPLICATION_ID:
        raise StoreError(
            f"{path} is a database of another program", hint="it was left as it is; QWENLET_DATA names another folder"
        )
    _check_version(path, version)
    return False


def _check_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer qwenlet: its schema is {version}, and this one knows {SCHEMA_VERSION}",
            hint="it was left as it is; update qwenlet, or QWENLET_DATA names another folder",
        )


def _prepare(path: Path, db: sqlite3.Connection, new: bool) -> None:
    """Settings, and the tables of this version."""
    db.execute("PRAGMA foreign_keys = ON")
    if not new:
        report = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if report != "ok":
            raise _damaged(path, report)
    if (version := db.execute("PRAGMA user_version").fetchone()[0]) < SCHEMA_VERSION:
        with _transaction(db):  # another process may have been quicker
            version = db.execute("PRAGMA user_version").fetchone()[0]
            for statements in _MIGRATIONS[version:]:
                for statement in statements:
                    db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {max(version, SCHEMA_VERSION)}")
    _check_version(path, version)
    _use_wal(db)
    db.execute("PRAGMA synchronous = NORMAL")


def _use_wal(db: sqlite3.Connection) -> None:
    """Readers and a writer don't wait for each other. The switch needs the file alone; SQLite does not wait for it."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)
