"""One SQLite file: opened with care, brought up to date, and its troubles put into words.

WAL mode lets several processes read while one writes; every change is a transaction of its own. A file that is damaged,
foreign or newer is refused before anything is written to it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import platformdirs

from qwenlet.errors import StoreError

_APPLICATION_ID = 0x51574C54  # "QWLT"
_LOCK_SECONDS = 10.0
_FILE = "history.sqlite3"
_MEMORY = ":memory:"  # SQLite's name for no file

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
    (  # the system prompt and the sampling that were chosen for a conversation
        "ALTER TABLE conversations ADD COLUMN settings TEXT NOT NULL DEFAULT '{}'",
    ),
    ("ALTER TABLE responses ADD COLUMN owner TEXT NOT NULL DEFAULT ''",),
    (  # how much is kept of each owner can be told from an index alone
        "ALTER TABLE responses ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
        "UPDATE responses SET bytes = length(CAST(body AS BLOB)) + length(CAST(input AS BLOB))",
        "CREATE INDEX responses_kept ON responses (owner, created, bytes)",
    ),
)
SCHEMA_VERSION = len(_MIGRATIONS)


def data_dir() -> Path:
    """Where what users made is kept: QWENLET_DATA, or the user's data folder."""
    named = os.environ.get("QWENLET_DATA")
    return Path(named).expanduser() if named else platformdirs.user_data_path("qwenlet", appauthor=False)


def is_off() -> bool:
    """Whether QWENLET_NO_HISTORY asks that no conversation be kept; empty and 0 don't."""
    return os.environ.get("QWENLET_NO_HISTORY", "0") not in ("", "0")


class Database:
    """An open file. Methods raise StoreError where it can't be read or written; any thread may use it."""

    def __init__(self, file: Path, connection: sqlite3.Connection) -> None:
        self.file = file
        self._connection = connection
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path | str | None = None) -> Self:
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

    @classmethod
    def open_in_memory(cls) -> Self:
        """One that nothing else opens, of which nothing reaches a disk; it is gone when it is closed."""
        where = Path(_MEMORY)
        with _words(where):
            connection = sqlite3.connect(_MEMORY, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA temp_store = MEMORY")
            _prepare(where, connection, new=True)
        return cls(where, connection)

    @property
    def in_memory(self) -> bool:
        return str(self.file) == _MEMORY

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, _words(self.file):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _words(self.file), _transaction(self._connection, "IMMEDIATE"):
            yield self._connection

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Several reads see the file as it is at one moment; nobody waits for them."""
        with self._lock, _words(self.file), _transaction(self._connection, "DEFERRED"):
            yield


def as_json(value: Any) -> str:
    """JSON text of what is kept. Raises StoreError where it is none."""
    try:
        return json.dumps(dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"what is to be kept is not JSON: {error}") from None


@contextmanager
def _transaction(db: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"]) -> Iterator[None]:
    """All or nothing. IMMEDIATE locks others' writes out at once: what is read inside can't change before a write."""
    db.execute(f"BEGIN {kind}")
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
    except sqlite3.ProgrammingError as error:  # a closed connection
        raise StoreError(f"{path} can't be used: {error}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error
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
        with _transaction(db, "IMMEDIATE"):  # another process may have been quicker
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
