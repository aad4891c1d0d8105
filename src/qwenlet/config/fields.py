"""Reading JSON objects field by field, strictly: every complaint names the file, the field and what was expected."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwenlet.errors import ConfigError


@contextmanager
def named(source: str) -> Iterator[None]:
    """Errors in the block say in which file the number stands."""
    try:
        yield
    except ConfigError as error:
        if source in error.message:
            raise
        raise ConfigError(f"{source}: {error.message}", hint=error.hint) from None


class Fields:
    """Takes fields out of a raw config; what is left and not known to be inert is an error."""

    def __init__(self, raw: Mapping[str, Any], source: str, model_type: str) -> None:
        self.raw = dict(raw)
        self.source = source
        self.model_type = model_type
        self.raw.pop("model_type", None)

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        if name not in self.raw:
            if default is ...:
                raise ConfigError(f"{self.source} has no {name}, which a {self.model_type} model needs")
            return default
        value = self.raw.pop(name)
        if value is None and default is not ...:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**1000 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.source}: {name} is {value!r}, expected {kind.__name__}")
        return value

    def require(self, name: str, allowed: Sequence[Any], why: str) -> None:
        """A field that may be absent, but if it is there must have one of the values we implement."""
        value = self.raw.pop(name, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{self.source}: {name} is {value!r}, but only {' or '.join(map(repr, allowed))} is implemented ({why})"
            )

    def take_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.pop(name, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) for item in values):
            raise ConfigError(f"{self.source}: {name} is {value!r}, expected a token id or a list of them")
        return tuple(values)

    def finish(self, inert: frozenset[str]) -> None:
        """Refuses what is left, except `inert` fields and private ones."""
        unknown = sorted(name for name in self.raw if name not in inert and not name.startswith("_"))
        if unknown:
            raise ConfigError(
                f"{self.source} has fields that are not understood for model_type {self.model_type!r}: "
                f"{', '.join(unknown)}",
                hint="a field that changes the maths can't be ignored; if this one doesn't, remove it from the file",
            )


def positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} is {value!r}, expected a positive whole number")


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file, with errors that name the file and the place in it."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist", hint="a model folder holds config.json beside its weights"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise ConfigError(f"{path} is not JSON that we read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value
