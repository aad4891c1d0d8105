"""`qwenlet convert`: a checkpoint in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.options import new_app

app = new_app()


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model as for chat: a folder, a .gguf file, a name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="The layout to write: qwen, as first published.")] = "qwen",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; as in the source unless given.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Write a checkpoint in another layout."""
    from qwenlet import checkpoint, hub

    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    with console.Progress() as progress:
        found = hub.resolve(source, offline=offline or None, progress=progress.update)
        path = checkpoint.convert(found, out, to=to, progress=progress.update, **options)
    print(path)
