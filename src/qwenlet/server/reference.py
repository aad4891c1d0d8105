"""What becomes of each field of each request, written down: docs/reference/server.md, and the page at /docs."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

import msgspec
from fastapi import FastAPI
from msgspec import Struct
from starlette.responses import HTMLResponse

from qwenlet.server.fields import effects

HEADINGS = {"honoured": "Honoured", "ignored": "Accepted without effect", "refused": "Refused"}
LEAD = (
    "Every field of a request is honoured, or accepted without effect and then named in the answer's header "
    "x-qwenlet-ignored, or refused with status 400 and its name. Fields that are not listed are refused; on "
    "/v1/messages and /api they are named in the header."
)

Requests = Sequence[tuple[str, type[Struct]]]


def fields(request: type[Struct], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, effect, words) of each field, those of nested objects behind it as `messages[].name`."""
    hints = get_type_hints(request)
    for name, effect, words, _ in effects(request):
        yield prefix + name, effect, words
        if effect == "honoured":
            for nested, many in _structs(hints[name]):
                yield from fields(nested, f"{prefix}{name}{'[]' if many else ''}.")


def _structs(hint: Any, many: bool = False) -> Iterator[tuple[type[Struct], bool]]:
    if isinstance(hint, type) and issubclass(hint, Struct):
        yield hint, many
    for part in get_args(hint):
        yield from _structs(part, many or (hint is not None and getattr(hint, "__origin__", None) is list))


def markdown(requests: Requests) -> str:
    parts = ["# The server's fields", "", "Made by `scripts/docs` from the requests' own definitions.", "", LEAD]
    for path, request in requests:
        parts += ["", f"## POST {path}", "", (request.__doc__ or "").partition("\n")[0]]
        for effect, names in _by_effect(request):
            parts += ["", f"{HEADINGS[effect]}:", ""]
            parts += [f"- `{name}`" + (f": {words}" if words else "") for name, words in names]
    return "\n".join([*parts, ""])


def page(requests: Requests) -> str:
    """The same as HTML, which loads nothing from elsewhere."""
    parts = [f"<!doctype html><meta charset=utf-8><title>qwenlet</title><h1>The server's fields</h1><p>{LEAD}</p>"]
    parts.append("<p>The whole API for programs: <a href=/openapi.json>openapi.json</a></p>")
    for path, request in requests:
        parts.append(
            f"<h2>POST {html.escape(path)}</h2><p>{html.escape((request.__doc__ or '').partition(chr(10))[0])}</p>"
        )
        for effect, names in _by_effect(request):
            items = "".join(f"<li><code>{html.escape(name)}</code> {html.escape(words)}" for name, words in names)
            parts.append(f"<h3>{HEADINGS[effect]}</h3><ul>{items}</ul>")
    return "\n".join(parts)


def _by_effect(request: type[Struct]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    every = list(fields(request))
    for effect in HEADINGS:
        if names := [(name, words.rstrip(".")) for name, each, words in every if each == effect]:
            yield effect, names


def add(app: FastAPI, requests: Requests) -> None:
    text = page(requests)

    @app.get("/docs", response_class=HTMLResponse)
    async def docs() -> str:
        """What becomes of each field."""
        return text


def document(schema: dict[str, Any], requests: Requests) -> None:
    """Puts the requests' schemas into an OpenAPI document."""
    _, components = msgspec.json.schema_components(
        [request for _, request in requests], ref_template="#/components/schemas/{name}"
    )
    schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
