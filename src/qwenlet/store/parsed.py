"""JSON from elsewhere, read with its place: what is not as expected is refused by where it stands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from qwenlet.errors import RequestError

MAX_DEPTH = 256  # of a document; what is kept may be walked by functions that call themselves


class Parsed:
    """A JSON value and its place in the document, such as "conversations[2].title"."""

    def __init__(self, value: Any, place: str = "") -> None:
        self.value = value
        self.place = place

    @property
    def is_object(self) -> bool:
        return isinstance(self.value, dict)

    def has(self, *names: str) -> bool:
        return self.is_object and all(name in self.value for name in names)

    def __getitem__(self, name: str) -> Parsed:
        """A field of an object; its value is None where the field is missing."""
        return Parsed(self.object().get(name), f"{self.place}.{name}" if self.place else name)

    def items(self) -> list[Parsed]:
        if not isinstance(self.value, list):
            self.refuse("a list")
        return [Parsed(value, f"{self.place}[{number}]") for number, value in enumerate(self.value)]

    def fields(self) -> Iterator[tuple[str, Parsed]]:
        return ((name, self[name]) for name in self.object())

    def object(self, *known: str) -> dict[str, Any]:
        """The value as an object that has no fields but `known`, if any are named."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        if known and (unknown := self.value.keys() - set(known)):
            name = min(unknown)
            raise RequestError(f"{self._where} has the field {name!r:.80}; known are {', '.join(known)}")
        value: dict[str, Any] = self.value
        return value

    def text(self, default: str | None = None) -> str:
        if self.value is None and default is not None:
            return default
        if not isinstance(self.value, str):
            self.refuse("text")
        try:
            self.value.encode()
        except UnicodeEncodeError:  # "\ud800" is JSON, but no text
            self.refuse("text without half a surrogate pair")
        value: str = self.value
        return value

    def seconds(self, default: float) -> float:
        """A time since 1970."""
        if self.value is None:
            return default
        try:
            if isinstance(self.value, bool) or not math.isfinite(seconds := float(self.value)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            self.refuse("seconds since 1970")
        return seconds

    def one_of(self, *known: str) -> str:
        if self.value not in known:
            self.refuse(f"one of {', '.join(known)}")
        return str(self.value)

    def refuse(self, expected: str) -> NoReturn:
        shown = json.dumps(self.value, ensure_ascii=True)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise RequestError(f"{self._where} is {shown}, expected {expected}")

    @property
    def _where(self) -> str:
        return self.place or "the document"


def parse(text: str) -> Parsed:
    """Raises ValueError for what is not JSON, NaN and Infinity included, and RecursionError for what is too deep."""
    value = json.loads(text, parse_constant=_no_constant)
    if depth(value) > MAX_DEPTH:
        raise RecursionError
    return Parsed(value)


def depth(value: Any) -> int:
    """How many lists and objects lie within each other: 0 for what is neither."""
    levels, level = 0, [value]
    while level := [one for one in level if isinstance(one, (list, dict))]:
        levels += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return levels


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
