"""How the server meets its clients."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwenlet.errors import ConfigError

TIMEOUTS = ("body", "request", "drain", "write", "idle")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the server meets its clients.

    Attributes:
        host: address to listen on; other machines reach only those that are not loopback.
        port: 0 takes any that is free.
        api_key: clients have to show one of these; QWENLET_API_KEY in the environment holds one that no process list
            shows.
        insecure: listen on an address that other machines reach although no key is asked for.
        served_name: names under which clients ask for the model; its own name if there are none.
        max_queue: requests that may wait for the engine; more are turned away with 503. A call for several replies
            takes at most half of the places that are free.
        max_concurrent: replies of one key, or of one address where there are no keys, at a time; more are turned away
            with 429. A call for several counts as many.
        max_per_minute: requests of one key, or of one address, in a minute; more are turned away with 429.
        max_tokens_per_minute: tokens of prompts and replies of one key, or of one address, in a minute; who has used
            them up is turned away with 429 until they have come back.
        cors_origin: web pages of these origins may call the server from a browser, "*" those of any; others' calls are
            turned away with 403.
        allowed_host: names, beside this machine's own, under which the server is asked for; any where it listens on an
            address that other machines reach and none is given.
        max_body: bytes of a request's body.
        body_timeout: seconds within which a body has to arrive.
        request_timeout: seconds within which a request has to end, the time it waits included.
        drain_timeout: seconds that requests get to end after SIGTERM.
        write_timeout: seconds that a client may take to read what was sent, until its request and its connection are
            ended.
        idle_timeout: seconds after which a connection without requests is closed, and within which a request's headers
            have to arrive.
        history: keep the conversations of the web page, in the file that `qwenlet chat` keeps its own in. Where several
            keys are known, or anyone may call, none are kept, for all clients would share them. Without it responses
            of /v1/responses are kept in memory alone.
        ping_interval: seconds of silence in a stream until a comment shows that the server lives.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: Sequence[str] | None = None
    insecure: bool = False
    served_name: Sequence[str] | None = None
    max_queue: int = 256
    max_concurrent: int | None = None
    max_per_minute: int | None = None
    max_tokens_per_minute: int | None = None
    cors_origin: Sequence[str] | None = None
    allowed_host: Sequence[str] | None = None
    max_body: int = 8_000_000
    body_timeout: float = 30.0
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    write_timeout: float = 60.0
    idle_timeout: float = 75.0
    ping_interval: float = 10.0
    history: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_key", tuple(self.api_key or ()))
        for name in ("served_name", "cors_origin", "allowed_host"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        for key in self.api_key or ():
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an api_key is empty or holds more than printable ASCII, which no header can carry")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, expected 0 to 65535")
        for name in ("max_body", *(f"{each}_timeout" for each in TIMEOUTS), "ping_interval"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}, expected a number above 0")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue is {self.max_queue}, expected 0 or more")
        for name in ("max_concurrent", "max_per_minute", "max_tokens_per_minute"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ConfigError(f"{name} is {limit}, expected 1 or more")
