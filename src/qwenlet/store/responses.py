"""Responses of /v1/responses, which later ones may go on from."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from qwenlet.store.database import Database, as_json
from qwenlet.store.records import StoredResponse


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
        """Keeps a response, or replaces what was kept of it. Nobody but `owner` finds it again."""
        with self._write() as db:
            db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET body = excluded.body WHERE owner = excluded.owner",
                (id, previous, as_json(body), as_json(list(input)), time.time(), owner),
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
