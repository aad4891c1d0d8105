"""Objects within a body that come in several kinds, and so are no structs: what becomes of their fields.

As with a request's own, a field is read, or has no effect and is named, or is refused by its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwenlet.server.errors import ApiError

_MOST_NAMED = 50  # a header can't carry any number
_NUMBER = re.compile(r"\[\d+\]")


@dataclass(frozen=True)
class Fields:
    """Attributes:
    read: fields that have an effect.
    inner: those that hold an object, or a list of objects, and what becomes of its fields.
    idle: those that ordinary clients send, and that have no effect here.
    """

    read: frozenset[str]
    inner: Mapping[str, Fields] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    @classmethod
    def of(cls, read: str, idle: str = "", **inner: Fields) -> Fields:
        """From names with spaces between them."""
        return cls(frozenset(read.split()), inner, frozenset(idle.split()))


def look(given: Any, fields: Fields, place: str, ignored: list[str], *, refuse: bool = False) -> None:
    """Puts what has no effect among `ignored`, as `tools[].strict`; null and an empty list say nothing.

    Args:
        place: where the object stands, as `tools[0]`.
        refuse: raise ApiError 400 for fields that are in no list, else they are named, too.
    """
    if isinstance(given, list):
        for number, one in enumerate(given):
            look(one, fields, f"{place}[{number}]", ignored, refuse=refuse)
        return
    if not isinstance(given, Mapping):
        return  # whoever reads it says what is wrong
    for name, value in given.items():
        if name in fields.read or value is None or value == []:
            continue
        if name in fields.inner:
            look(value, fields.inner[name], f"{place}.{name}", ignored, refuse=refuse)
        elif refuse and name not in fields.idle:
            known = ", ".join(sorted(fields.read | fields.inner.keys()))
            raise ApiError(
                400, f"{place} has an unknown field {name!r:.80}; known are {known}", param=f"{place}.{name:.80}"
            )
        elif name.isascii() and name.isprintable() and len(ignored) < _MOST_NAMED:
            named = f"{_NUMBER.sub('[]', place)}.{name[:40]}"
            if named not in ignored:
                ignored.append(named)
