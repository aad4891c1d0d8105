"""What every call passes: a request id, the key, limits, the body's size and time, errors in one shape, the access log.

The log has method, path, status and time, and nothing of what people wrote.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenlet.config import is_loopback
from qwenlet.server import errors, origin, page
from qwenlet.server.errors import ApiError
from qwenlet.server.patience import Patience
from qwenlet.server.service import LEFT, Client, Service

logger = logging.getLogger("qwenlet.server")

OPEN_PATHS = frozenset(["/health", "/ready"])  # for what watches the server, which has no key
_READS = frozenset(["GET", "HEAD", "OPTIONS"])
_GOOD_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Keys:
    """The keys that are accepted. A check takes the same time whatever is shown and whichever key it is."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, number: int) -> str:
        """Under what the holder of a key keeps things: the same in every order of keys, and the key can't be shown."""
        return hashlib.sha256(b"qwenlet owner " + self._digests[number]).hexdigest()

    def find(self, shown: bytes) -> int | None:
        """The number of the key that was shown."""
        digest, found = hashlib.sha256(shown).digest(), None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = number
        return found


class Gate:
    """ASGI around the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = Keys(tuple(service.config.api_key or ()))
        self._limits = service.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _GOOD_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status, complete = 0, False
        patience = Patience(self._service.config.write_timeout)

        async def answer(message: Message) -> None:
            nonlocal status, complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status = message["status"]
                took = f"{(time.perf_counter() - began) * 1e3:.0f}".encode()
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", took),
                ]
            await patience.write(send(message))

        try:
            await self._admitted(scope, headers, receive, answer)
        except ClientDisconnect:
            status = status or LEFT
        except Exception as problem:  # of any kind: no client is left without an answer, and none sees the inside
            error = errors.told(problem, request_id)
            if status:
                if complete:
                    return  # answered by the application's own handler
                raise  # too late for another answer: the connection is cut
            await errors.response(error, scope["path"])(scope, receive, answer)
        finally:
            patience.close()
            if patience.lost:
                logger.warning("%s is not read by its client", request_id)
            self._service.answers[status] += 1
            took_ms = (time.perf_counter() - began) * 1e3
            logger.info("%s %s %s %d %.0f ms", request_id, scope["method"], _shown(scope["path"]), status, took_ms)

    async def _admitted(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        self._check_host(headers)
        client = self._client(scope, headers)
        scope["state"]["client"] = client
        if scope["path"].startswith(page.API):
            # keeping what was said is no request of the model, and takes no share of its limits
            # whatever --cors-origin lets other pages do elsewhere
            origin.check(headers, "conversations belong to the server's own page")
            await self._app(scope, self._bounded(headers, receive), send)
            return
        if scope["method"] not in _READS:
            words = "pages of other origins may not call this server unless --cors-origin names them"
            origin.check(headers, words, self._service.config.cors_origin or ())
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._limits.take(client.name)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                left = self._limits.told(client.name)
                more = [(name.encode(), value.encode()) for name, value in left.items()]
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        with self._limits.running(client.name):
            await self._app(scope, self._bounded(headers, receive), answer)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site may have its own name point here, to be let in as if it were this machine's."""
        config = self._service.config
        if b"host" not in headers or not (is_loopback(config.host) or config.allowed_host):
            return
        try:
            name = urlsplit(f"//{headers[b'host'].decode('latin-1')}").hostname or ""
        except ValueError:
            name = ""
        if not is_loopback(name) and name not in (config.allowed_host or ()):
            words = f"this server is not known as {name!r:.100}; --allowed-host tells it its names"
            raise ApiError(403, words, "permission_error", code="host_not_allowed")

    def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> Client:
        """Whose limits count. Raises ApiError 401 without a good key, where one is needed."""
        if not self._keys or scope["path"] in OPEN_PATHS or scope["path"] in page.paths():
            return Client(str((scope.get("client") or ("",))[0]))
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        shown = token.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        number = self._keys.find(shown)
        if number is None:
            seen = "this API key is not known" if shown else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, seen, "authentication_error", code="invalid_api_key")
        return Client(f"key {number}", self._keys.owner(number))

    def _bounded(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """`receive`, which raises ApiError for a body that is too large or too slow."""
        config = self._service.config
        too_large = ApiError(413, f"the body is larger than {config.max_body} bytes", code="body_too_large")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > config.max_body:
            raise too_large
        deadline = time.monotonic() + config.body_timeout
        seen, complete = 0, False

        async def bounded() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
                    message = await receive()
            except TimeoutError:
                words = f"the body did not arrive within {config.body_timeout:g} s"
                raise ApiError(408, words, code="body_timeout", headers={"connection": "close"}) from None
            seen += len(message.get("body", b""))
            if seen > config.max_body:
                raise too_large
            complete = not message.get("more_body", False)
            return message

        return bounded


def _shown(path: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in path[:200])
