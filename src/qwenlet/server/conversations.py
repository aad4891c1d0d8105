"""/page/api/...: the conversations of the web page, in the store that the command line shares.

It is the page's own door and no public protocol: GET reads, POST changes, and only the page itself may call it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI, Request
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.responses import Response

from qwenlet.server.bodies import decoded, of_body
from qwenlet.server.errors import ApiError
from qwenlet.server.page import API
from qwenlet.server.responses import kept
from qwenlet.server.service import Service
from qwenlet.store import TOLD, Conversation, Store, StoredMessage, Tree, interchange

Body = TypeVar("Body", bound=Struct)
_MOST_LISTED = 200
_MOST_FOUND = 50
Title = Annotated[str, Meta(max_length=500)]
Role = Literal["system", "user", "assistant", "tool"]


class NewConversation(Struct, kw_only=True, forbid_unknown_fields=True):
    title: Title = ""
    settings: dict[str, Any] = msgspec.field(default_factory=dict)


class Change(Struct, kw_only=True, forbid_unknown_fields=True):
    """`current`: the message whose branch is shown from now on."""

    title: Title | UnsetType = UNSET
    settings: dict[str, Any] | UnsetType = UNSET
    current: str | UnsetType = UNSET


class NewMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Role
    content: str
    parent: str | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class Text(Struct, kw_only=True, forbid_unknown_fields=True):
    """A reply as far as it is written."""

    content: str
    extra: dict[str, Any]


class Nothing(Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class HeldConversation(Struct, kw_only=True):
    """As the page holds it where nothing is kept."""

    id: str
    title: str
    model: str
    current: str | None
    created: float
    updated: float
    settings: dict[str, Any]


class HeldMessage(Struct, kw_only=True):
    id: str
    parent: str | None
    role: Role
    content: str
    created: float
    extra: dict[str, Any]


class HeldTree(Struct, kw_only=True):
    conversation: HeldConversation
    messages: list[HeldMessage]

    def tree(self) -> Tree:
        """Raises ApiError 400 where the messages are no tree, which could be walked without end, and RequestError for
        one that no model could be told."""
        known: set[str | None] = {None}
        for number, one in enumerate(self.messages):
            if one.parent not in known or one.id in known:
                words = "has no id of its own, or a parent that does not stand before it"
                raise ApiError(400, f"messages[{number}] {words}", param="conversations")
            known.add(one.id)
        if self.conversation.current not in known:
            words = f"current is {self.conversation.current!r:.80}, which is none of the messages"
            raise ApiError(400, words, param="conversations")
        talk = Conversation(**msgspec.structs.asdict(self.conversation))
        messages = [StoredMessage(conversation=talk.id, **msgspec.structs.asdict(one)) for one in self.messages]
        tree = Tree(talk, tuple(messages))
        interchange.check(tree)
        return tree


class Held(Struct, kw_only=True, forbid_unknown_fields=True):
    conversations: list[HeldTree]


def add(app: FastAPI, service: Service) -> None:
    def route(method: str, path: str, handler: Callable[..., Awaitable[Response]], *, stored: bool = True) -> None:
        async def endpoint(request: Request) -> Response:
            if stored and not service.keeps_history:
                raise ApiError(404, "this server keeps no conversations", "not_found_error", code="history_off")
            return await handler(request)

        app.add_api_route(f"{API}{path}", endpoint, methods=[method], include_in_schema=False, name=f"{method} {path}")

    async def listed(request: Request) -> Response:
        limit, offset = _number(request, "limit", _MOST_LISTED), _number(request, "offset", 2**31)
        return _json(await kept(service, lambda store: store.conversations(limit, offset)))

    async def found(request: Request) -> Response:
        words = request.query_params.get("text", "")
        hits = await kept(service, lambda store: store.search(words, _MOST_FOUND))
        return _json(
            [
                {
                    "conversation": one.conversation,
                    "message": one.message and one.message.id,
                    "excerpt": one.excerpt,
                }
                for one in hits
            ]
        )

    async def created(request: Request) -> Response:
        body = await _body(request, NewConversation)
        # as the command line would load it, for `qwenlet chat --continue`
        path = Path(service.llm.name)
        model = str(path.resolve()) if path.exists() else service.llm.name
        made = await kept(service, lambda store: store.new_conversation(body.title, model, body.settings))
        return _json(made)

    async def read(request: Request) -> Response:
        id = request.path_params["id"]
        return _json(_told(await kept(service, lambda store: store.tree(id))))

    async def changed(request: Request) -> Response:
        id, body = request.path_params["id"], await _body(request, Change)
        if body.title is not UNSET:
            title = body.title
            await kept(service, lambda store: store.rename(id, title))
        if body.settings is not UNSET:
            settings = body.settings
            await kept(service, lambda store: store.set_settings(id, settings))
        if body.current is not UNSET:
            current = body.current
            await kept(service, lambda store: store.select(current))
        return _json(await kept(service, lambda store: store.conversation(id)))

    async def deleted(request: Request) -> Response:
        id = request.path_params["id"]
        await _body(request, Nothing)
        await kept(service, lambda store: store.delete(id))
        return _json({"deleted": True})

    async def added(request: Request) -> Response:
        id, body = request.path_params["id"], await _body(request, NewMessage)
        _check(id, body.role, body.content, body.extra)
        made = await kept(service, lambda store: store.add(id, body.parent, body.role, body.content, body.extra))
        return _json(made)

    async def written(request: Request) -> Response:
        id, body = request.path_params["id"], await _body(request, Text)
        _check(id, "assistant", body.content, body.extra)
        await kept(service, lambda store: store.update(id, body.content, body.extra))
        return _json({"updated": True})

    async def exported(request: Request) -> Response:
        id = request.path_params.get("id")
        trees = await kept(service, lambda store: [store.tree(id)] if id is not None else list(_all(store)))
        return await asyncio.to_thread(_file, request, trees)

    async def imported(request: Request) -> Response:
        trees = await _read_file(request)
        made = await kept(service, lambda store: store.adopt(trees))
        return _json(made)

    async def rendered(request: Request) -> Response:
        held = await _body(request, Held)
        return await asyncio.to_thread(lambda: _file(request, [one.tree() for one in held.conversations]))

    async def parsed(request: Request) -> Response:
        trees = await _read_file(request)
        return _json([_told(tree) for tree in trees])

    route("GET", "conversations", listed)
    route("POST", "conversations", created)
    route("GET", "search", found)
    route("GET", "conversations/{id}", read)
    route("POST", "conversations/{id}", changed)
    route("POST", "conversations/{id}/delete", deleted)
    route("POST", "conversations/{id}/messages", added)
    route("POST", "messages/{id}", written)
    route("GET", "conversations/{id}/export", exported)
    route("GET", "export", exported)
    route("POST", "import", imported)
    # for a page whose server keeps nothing: files are made and read here, and stay with the page
    route("POST", "render", rendered, stored=False)
    route("POST", "read", parsed, stored=False)


def _check(id: str, role: str, content: str, extra: dict[str, Any]) -> None:
    """Raises RequestError for calls and results that no model could be told."""
    if not set(TOLD).isdisjoint(extra):
        interchange.check_message(StoredMessage("", id, None, role, content, 0.0, extra))


async def _body(request: Request, kind: type[Body]) -> Body:
    return await of_body(request, lambda raw: decoded(raw, msgspec.json.Decoder(kind)))


async def _read_file(request: Request) -> tuple[Tree, ...]:
    raw = await request.body()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ApiError(400, f"the file is not UTF-8: {problem.reason} at byte {problem.start}") from None
    imported = await asyncio.to_thread(interchange.read, text, "the file")
    return imported.trees


def _number(request: Request, name: str, most: int) -> int:
    given = request.query_params.get(name, "0" if name == "offset" else str(most))
    if not (given.isascii() and given.isdigit() and len(given) < 12):
        raise ApiError(400, f"{name} is {given!r:.80}, expected a whole number", param=name)
    return min(int(given), most)


def _all(store: Store) -> Iterator[Tree]:
    offset = 0
    while page := store.conversations(_MOST_LISTED, offset):
        yield from (store.tree(one.id) for one in page)
        offset += len(page)


def _file(request: Request, trees: Iterable[Tree]) -> Response:
    form = request.query_params.get("form", "json")
    if form == "json":
        return Response(interchange.to_json(trees), media_type="application/json")
    if form == "markdown":
        return Response("".join(map(interchange.to_markdown, trees)), media_type="text/markdown; charset=utf-8")
    raise ApiError(400, f"form is {form!r:.80}, expected json or markdown", param="form")


def _told(tree: Tree) -> dict[str, Any]:
    return {"conversation": tree.conversation, "messages": tree.messages}


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json", headers={"cache-control": "no-store"})
