"""`qwenlet pull`: files of a model onto this machine. stdout gets the path, stderr the progress and a summary."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.options import new_app

app = new_app()


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A name on the hub like Qwen/Qwen-1_8B-Chat, or demo.")],
    revision: Annotated[str | None, typer.Option(help="A commit, tag or branch.")] = None,
    source: Annotated[str | None, typer.Option(help="Where to fetch from: huggingface or modelscope.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Refuse to go online.")] = False,
) -> None:
    """Fetch a model and print where it is.

    What is there already is not fetched again, and a broken download goes on where it stopped.
    """
    from qwenlet import hub

    used: dict[str, Any] = {"revision": revision, "source": source, "offline": offline or None}
    with console.Progress() as progress:
        pulled = hub.pull(
            name,
            progress=progress.update,
            **{option: value for option, value in used.items() if value is not None},
        )
    fetched = f"{console.size(pulled.bytes_downloaded)} fetched" if pulled.bytes_downloaded else "nothing to fetch"
    at = f" at {pulled.revision}" if pulled.revision else ""
    files = "1 file" if pulled.files == 1 else f"{pulled.files} files"
    console.note(f"{name}{at}: {files}, {console.size(pulled.bytes_total)}, {fetched}")
    print(pulled.path)
