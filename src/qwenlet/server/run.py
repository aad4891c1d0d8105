"""Sockets, signals, and the order of starting and stopping.

The address is taken first, so that a port in use is known before minutes of loading; the model is loaded while the
server answers 503 with Retry-After. SIGTERM and Ctrl-C end it: no new connections, and what runs may end within
`drain_timeout`. A load that runs can't be stopped, and isn't waited for.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn

from qwenlet.config import ServerConfig, is_loopback
from qwenlet.errors import ConfigError
from qwenlet.llm import LLM
from qwenlet.server.app import build
from qwenlet.server.connection import Connection
from qwenlet.server.service import Service

_MOST_FILES = 65_536
_LOAD_ENDS_SECONDS = 1.0  # for a load that is nearly done when the server is told to end


def serve(
    name: str,
    config: ServerConfig,
    load: Callable[[], LLM],
    say: Callable[[str], None],
    listening: Callable[[str], None] | None = None,
) -> bool:
    """Serves until a signal comes. `say` tells a person where, and when the model is there.

    Returns False where the model was still being loaded: the thread that does is in native code, so that only
    `os._exit` ends the process in order.

    Args:
        listening: called with the server's address as soon as connections are taken, before the model is there.

    Raises:
        ConfigError: an address that others reach without a key, or one that can't be had.
        QwenletError: what `load` raises.
    """
    check_exposed(config)
    _allow_connections()
    taken = _listen(config)
    service = Service(name, config)
    host, port = taken.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"{address}: loading {service.own_names[0]}")
    if listening is not None:
        listening(address)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(service, taken, load, say))
    finally:
        taken.close()


def check_exposed(config: ServerConfig) -> None:
    """Raises ConfigError for an address that other machines reach, with no key and no word that this is meant."""
    if config.api_key or config.insecure or is_loopback(config.host):
        return
    raise ConfigError(
        f"host is {config.host!r}, which other machines reach, and no API key is asked for",
        hint="set QWENLET_API_KEY or --api-key; or --insecure, if whoever reaches this address may use it",
    )


def _listen(config: ServerConfig) -> socket.socket:
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(1024)
        except OSError:
            listening.close()
            raise
    except OSError as problem:
        raise ConfigError(
            f"can't listen on {config.host} port {config.port}: {problem.strerror}",
            hint="another --port, or --port 0 for any that is free",
        ) from None
    return listening


def _allow_connections() -> None:
    """Each takes a file descriptor, and shells often allow 1,024: as many as the system lets a process have."""
    try:
        import resource
    except ImportError:
        return  # Windows counts no such thing
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is: a stream's event costs a fifth less; it knows no Windows."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop
    return new_event_loop


async def _serve(
    service: Service, listening: socket.socket, load: Callable[[], LLM], say: Callable[[str], None]
) -> bool:
    config = service.config
    protocol: Any = partial(Connection, config)  # called as a class would be
    server = _Server(
        service,
        uvicorn.Config(
            build(service),
            http=protocol,
            access_log=False,  # the gate's own has ids, and nothing of what people wrote
            log_config=None,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=int(config.drain_timeout),
        ),
    )
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    loading = _in_thread(load)
    either: set[asyncio.Future[Any]] = {serving, loading}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        say("ending: the model is still being loaded")
        await asyncio.wait({loading}, timeout=_LOAD_ENDS_SECONDS)
        if not loading.done():
            service.close()
            return False
    try:
        llm = await loading
    except BaseException:
        server.should_exit = True
        await serving
        raise
    with llm:
        if not serving.done():
            llm.engine.start()
            service.open(llm)
            say("ready")
        await serving
    service.close()
    return True


def _in_thread(load: Callable[[], LLM]) -> asyncio.Future[LLM]:
    """The model, by a thread that nothing waits for: the loop's own threads are all waited for at its end."""
    loaded: Future[LLM] = Future()

    def run() -> None:
        try:
            loaded.set_result(load())
        except BaseException as problem:
            loaded.set_exception(problem)

    threading.Thread(target=run, name="qwenlet-loading", daemon=True).start()
    return asyncio.wrap_future(loaded)


class _Server(uvicorn.Server):
    """Tells the service when it ends."""

    def __init__(self, service: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.state = "draining"
        await super().shutdown(sockets)
        self._captured_signals.clear()  # uvicorn would raise them again, before the model is closed
