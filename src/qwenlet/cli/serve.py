"""`qwenlet serve`: a model for clients of OpenAI's API, and for people with a browser."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.loading import load
from qwenlet.cli.options import EngineFlags, Flags, LoadFlags, adapter_names, expand, new_app
from qwenlet.config import ServerConfig
from qwenlet.errors import MissingExtraError
from qwenlet.machine import give_back_freed_blocks

app = new_app()
_EXTRA = {"fastapi", "starlette", "uvicorn", "httptools", "msgspec", "prometheus_client"}


@app.command()
@expand
def serve(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a name on the hub, or demo.")] = "demo",
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each request.")] = False,
    *,
    server: Annotated[dict[str, Any], Flags(ServerConfig)],
    loading: LoadFlags,
    engine: EngineFlags,
) -> None:
    """Serve a model to clients of OpenAI's API, and to people by a web page.

    It listens on this machine alone unless --host says otherwise, and then asks for a key. SIGTERM or Ctrl-C lets what
    runs end.
    """
    server["api_key"] = [*server.get("api_key", ()), *keys_of_environment()]
    start(model, ServerConfig(**server), loading, engine, quiet=quiet)


def keys_of_environment() -> list[str]:
    key = os.environ.get("QWENLET_API_KEY")
    return [key] if key else []


def start(
    model: str,
    config: ServerConfig,
    loading: dict[str, Any],
    engine: dict[str, Any],
    *,
    quiet: bool,
    listening: Callable[[str], None] | None = None,
) -> None:
    """Serves until a signal comes; `listening` is told the address."""
    adapter_names(loading)
    try:
        from qwenlet.server import serve as run
    except ImportError as problem:
        if problem.name not in _EXTRA:
            raise
        raise MissingExtraError(problem.name or "fastapi", "serve", "the server") from problem

    from qwenlet.llm import LLM  # only now, because it takes seconds

    give_back_freed_blocks()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("qwenlet.server").setLevel(logging.WARNING if quiet else logging.INFO)

    progress = console.Progress()

    def loaded() -> LLM:
        return load(model, quiet=quiet, line=progress, **loading, **engine)

    if not run(model, config, loaded, console.note, listening):
        progress.close()
        console.leave()
