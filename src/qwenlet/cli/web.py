"""`qwenlet chat --web`: the page of `qwenlet serve`, on this machine alone, opened in the browser."""

from __future__ import annotations

import socket
import threading
import webbrowser
from typing import Any

from qwenlet.cli import console, serve
from qwenlet.config import ServerConfig

# the same each time, so that the browser knows the page again; another one where it is taken
_PORT = 8642


def talk(model: str, loading: dict[str, Any], engine: dict[str, Any], *, history: bool) -> None:
    """Serves the page until Ctrl-C. The browser opens at once, and the page waits for the model."""
    config = ServerConfig(port=_port(), api_key=serve.keys_of_environment(), history=history)
    serve.start(model, config, loading, engine, quiet=True, listening=_show)


def _port() -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", _PORT))
        except OSError:
            return 0
    return _PORT


def _show(address: str) -> None:
    def show() -> None:
        try:
            opened = webbrowser.open(address)
        except webbrowser.Error:
            opened = False
        if not opened:
            console.note(f"no browser could be opened; the page is at {address}")

    # a browser may take its time, and one in a terminal all of it
    threading.Thread(target=show, daemon=True).start()
