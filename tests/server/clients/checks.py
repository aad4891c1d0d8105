"""Runs a script's checks: every function whose name begins with `check_`, each with the client; JSON comes out."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from typing import Any


def run(found: Mapping[str, Any], client: Any) -> None:
    outcomes = {}
    for name, check in [*found.items()]:
        if name.startswith("check_"):
            try:
                check(client)
                outcomes[name] = ""
            except Exception:
                outcomes[name] = traceback.format_exc()
    json.dump(outcomes, sys.stdout)


WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
QUESTION = "What is the weather in Paris?"
FRANCE = "What is the capital of France?"
