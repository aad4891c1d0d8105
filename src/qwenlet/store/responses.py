"""Responses of /v1/responses, which later ones may go on from: the latest of each owner, for 30 days."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from qwenlet.store.database import Database, as_json
from qwenlet.store.records import StoredResponse

KEPT_DAYS = 30  # OpenAI's
MOST_RESPONSES = 10_000  # of one owner; beyond it the oldest go
MOST_BYTES, MOST_BYTES_IN_MEMORY = 500_000_000, 50_000_000  # the same

_EXPIRED = "DELETE FROM responses WHERE created < ?"
_SURPLUS = """DELETE FROM responses WHERE rowid IN (
    SELECT number FROM (
        SELECT rowid AS number, ROW_NUMBER() OVER latest AS place, SUM(bytes) OVER latest AS held
        FROM responses WHERE owner = ?
        WINDOW latest AS (ORDER BY created DESC, bytes DESC, rowid DESC ROWS UNBOUNDED PRECEDING))
    WHERE place > ? OR held > ?)"""


class Responses(Database):
    """The part of the store that keeps responses."""

    def save_response(
        self,
        id: str,
        body: Mapping[str, Any],
        input: tuple[Mapping[str, Any], ...] = (),
        previous: str | None = None,
        *,
        owner: str = "",
    ) -> None:
        """Keeps a response, or replaces what was kept of it. Nobody but `owner` finds it again.

        The owner's oldest go where there are more than MOST_RESPONSES, or more than MOST_BYTES in all.
        """
        made, items = as_json(body), as_json(list(input))
        with self._write() as db:
            size = len(made.encode()) + len(items.encode())
            db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "body = excluded.body, bytes = length(CAST(excluded.body || input AS BLOB)) "
                "WHERE owner = excluded.owner",
                (id, previous, made, items, time.time(), owner, size),
            )
            most = MOST_BYTES_IN_MEMORY if self.in_memory else MOST_BYTES
            db.execute(_SURPLUS, (owner, MOST_RESPONSES, most))
            db.execute(_EXPIRED, (_oldest(),))

    def expire_responses(self) -> None:
        """Lets go of those that are older than KEPT_DAYS."""
        with self._write() as db:
            db.execute(_EXPIRED, (_oldest(),))

    def response(self, id: str, *, owner: str = "") -> StoredResponse | None:
        query = "SELECT id, previous, body, input, created FROM responses WHERE id = ? AND owner = ? AND created >= ?"
        rows = self._read(query, id, owner, _oldest())
        if not rows:
            return None
        name, previous, body, items, created = rows[0]
        return StoredResponse(name, previous, json.loads(body), tuple(json.loads(items)), created)

    def delete_response(self, id: str, *, owner: str = "") -> bool:
        """Whether it was there."""
        with self._write() as db:
            return db.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (id, owner)).rowcount > 0


def _oldest() -> float:
    """When the oldest was made that is still kept."""
    return time.time() - KEPT_DAYS * 86_400
