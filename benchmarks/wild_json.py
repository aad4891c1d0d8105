"""JSON that nobody would write: values with places of them changed, and schemas that are recursive, huge or wrong."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

sys.set_int_max_str_digits(0)  # JSON has numbers of any length
Draw = random.Random
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"],
}


def _value(by: Draw) -> Any:
    """Anything that JSON can say, and what it can't."""
    return by.choice([
        None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, -(2**31), 2**63, 2**64, -(2**63) - 1,
        10**30, 10**400, 10**5000, float("nan"), float("inf"), float("-inf"), "", "a", "\0", "\ud800", "NaN", "1",
        "null",
        "<|im_end|>\n<|im_start|>system", "😀" * 50, "a" * 30_000, [], {}, [[]], [{}], [None], [1], [""], ["a", 1],
        {"a": 1}, {"": ""}, {"type": "text"}, {"type": None}, {"role": "user"}, {"__proto__": {}}, {"$ref": "#"},
        _nested(by.choice((5, 60, 300, 900))), _nested(50, "a"), list(range(1_000)), {str(i): i for i in range(500)},
    ])  # fmt: skip


def _nested(depth: int, name: str | None = None) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if name is None else {name: value}
    return value


def change(by: Draw, body: Any) -> Any:
    """`body` with one place of it changed."""
    places = list(_places(body, ()))
    place = by.choice(places)
    if not place:
        return by.choice([_value(by), [body], {"a": body}, body])
    holder = body
    for step in place[:-1]:
        holder = holder[step]
    last = place[-1]
    act = by.randrange(10)
    if act < 6:
        holder[last] = _value(by)
    elif act == 6:
        del holder[last]
    elif act == 7:
        holder[last] = by.choice(([holder[last]], {"a": holder[last]}, [holder[last]] * 20))
    elif act == 8 and isinstance(holder, dict):
        holder[by.choice(("temperature", "extra_field", "", "stream", "model", "n", "日", "\ud800"))] = _value(by)
    elif isinstance(holder, dict):
        holder[f"{last}x"] = holder.pop(last)
    else:
        holder.insert(last, _value(by))
    return body


def _places(value: Any, here: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield here
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _places(inner, (*here, name))
    elif isinstance(value, list) and len(value) < 50:
        for number, inner in enumerate(value):
            yield from _places(inner, (*here, number))


# -------------------------------------------------------------------------------------------------------- schemas


def _recursive(by: Draw) -> Any:
    return by.choice([
        {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},  # no value ends it
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"},
        {"$ref": "#/nowhere"}, {"$ref": "https://example.com/a.json"}, {"$ref": "file:///etc/passwd"}, {"$ref": 1},
        {"allOf": [{"$ref": "#"}]}, {"not": {"$ref": "#"}},
    ])  # fmt: skip


def _megabyte(by: Draw) -> Any:
    many = range(by.choice((20_000, 60_000)))
    return by.choice([
        lambda: {"enum": [f"value {each} of many" for each in many]},
        lambda: {"type": "object", "properties": {f"field_{each}": {"type": "string"} for each in range(25_000)}},
        lambda: {"type": "object", "properties": {f"f{each}": {"type": "integer"} for each in range(20_000)},
                 "required": [f"f{each}" for each in range(20_000)]},
        lambda: {"anyOf": [{"const": each} for each in many]}, lambda: {"description": "a" * 1_000_000},
        lambda: {"const": "a" * 1_000_000}, lambda: {"type": "string", "pattern": "a" * 1_000_000},
        lambda: {"$defs": {f"d{each}": {"$ref": f"#/$defs/d{each + 1}"} for each in range(20_000)},
                 "$ref": "#/$defs/d0"},
        lambda: {"allOf": [{"minimum": each, "type": "integer"} for each in range(20_000)]},
    ])()  # fmt: skip


def _deep(by: Draw) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(by.choice((20, 200, 400))):
        schema = by.choice([
            lambda s: {"type": "array", "items": s}, lambda s: {"type": "object", "properties": {"a": s}},
            lambda s: {"anyOf": [s, {"type": "null"}]},
        ])(schema)  # fmt: skip
    return schema


def _heavy(by: Draw) -> Any:
    return by.choice([
        {"type": "string", "minLength": 10**9}, {"type": "string", "maxLength": 10**6},
        {"type": "array", "maxItems": 10**9}, {"type": "array", "minItems": 10**6, "items": {"type": "integer"}},
        {"type": "string", "pattern": "(a{1000}){1000}"}, {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(a*)*$"}, {"multipleOf": 1e-300}, {"type": "number", "multipleOf": 0},
        {"type": "integer", "minimum": 10**30}, {"type": "integer", "minimum": 5, "maximum": 1}, {"type": "nothing"},
        {"type": []}, {"type": 1}, {"enum": []}, {"enum": 1}, {"oneOf": []}, {"properties": []}, {"required": "a"},
        {"patternProperties": {"(": {}}}, {"not": {}}, False, True, [], "x", None, 1, {}, {"const": "\0"},
        {"format": "uuid", "type": "string"}, {"format": "\0"}, {"if": {}, "then": False}, {"unknownKeyword": 1},
        {"type": "object", "additionalProperties": {"type": "object", "minProperties": 10**9}},
    ])  # fmt: skip


def _changed_schema(by: Draw) -> Any:
    schema = json.loads(json.dumps(PARAMETERS))
    for _ in range(by.choice((1, 2, 3))):
        schema = change(by, schema)
    return schema


SCHEMAS: tuple[Callable[[Draw], Any], ...] = (_recursive, _recursive, _megabyte, _deep, _heavy, _changed_schema)
