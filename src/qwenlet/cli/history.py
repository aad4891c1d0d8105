"""`qwenlet history`: the conversations that chat and the server's page have kept."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.options import new_app
from qwenlet.errors import RequestError
from qwenlet.store import Conversation, Store, StoredMessage, Tree

app = new_app()
_ALL = 1_000_000  # more than anybody has

Id = Annotated[str, typer.Argument(help="An id, or its beginning.", metavar="ID")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on each line.")]


class Format(StrEnum):
    """What an export is written as."""

    JSON = "json"
    MARKDOWN = "markdown"


@app.callback()
def history() -> None:
    """List, search, show and move the conversations that were kept."""


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, the last first.")] = 20,
    as_json: Json = False,
) -> None:
    """The conversations that changed last: id, time, model, title."""
    with Store.open() as store:
        talks = store.conversations(limit=limit)
        for talk in talks:
            print(_json(asdict(talk)) if as_json else _row(talk))
        if not talks:
            console.note("no conversations yet; qwenlet chat keeps its own")
        elif len(talks) == limit and len(store.conversations(limit=1, offset=limit)):
            console.note(f"the last {limit}; --limit shows more")


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(help="Words that all have to be there, in any letter case.")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many places, the last first.")] = 20,
    as_json: Json = False,
) -> None:
    """Look for words, or parts of words, in titles and messages."""
    text = console.check_text(" ".join(words), "the search")
    with Store.open() as store:
        found = store.search(text, limit=limit)
        for place in found:
            if as_json:
                print(_json(asdict(place)))
            else:
                role = "" if place.message is None else f"  {place.message.role}: {place.excerpt}"
                print(_row(place.conversation) + ("\n" + _clean(role) if role else ""))
    if not found:
        console.note(f"nothing has {text!r}")
        raise typer.Exit(console.FAILURE)


@app.command()
def show(
    id: Id,
    as_json: Annotated[bool, typer.Option("--json", help="The whole tree as JSON.")] = False,
) -> None:
    """Print a conversation: the branch that is current."""
    with Store.open() as store:
        tree = store.tree(store.find(id).id)
    if as_json:
        print(_json(asdict(tree)))
        return
    console.message(_row(tree.conversation), style="bold")
    system = tree.conversation.settings.get("system")
    if system:
        print(_clean(f"system> {system}\n"))
    for message in tree.path:
        print(_clean(f"{_label(message)}> {message.content}\n"))
    if hidden := len(tree.messages) - len(tree.path):
        console.note(f"{hidden} more messages on other branches; --json shows them, /branches in a chat goes there")


@app.command()
def export(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids, or their beginnings.", metavar="[IDS]...")] = None,
    every: Annotated[bool, typer.Option("--all", help="All conversations.")] = False,
    to: Annotated[Format, typer.Option(help="json holds every branch, markdown the current one.")] = Format.JSON,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file; stdout if unset.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
) -> None:
    """Write conversations as JSON or Markdown; import reads both."""
    from qwenlet.cli.saved import write_atomically
    from qwenlet.store.interchange import to_json, to_markdown

    if out is not None and out.exists() and not force:
        raise RequestError(f"{out} exists already", hint="choose another name, or overwrite it with --force")
    with Store.open() as store:
        trees = [store.tree(talk.id) for talk in _chosen(store, ids or [], every)]
    text = to_json(trees) if to is Format.JSON else "".join(map(to_markdown, trees))
    if out is None:
        sys.stdout.write(_clean(text))
    else:
        write_atomically(out.resolve(), text)
        console.note(f"{_count(trees)} in {out}")


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="JSON, JSON lines or Markdown; - is stdin.", allow_dash=True)],
) -> None:
    """Keep the conversations of a file: qwenlet's own, ChatGPT's export, OpenAI's messages, ShareGPT.

    A file that can't be read whole brings nothing. The ids of the new conversations are printed.
    """
    from qwenlet.store.interchange import read

    read_in = []
    for file in files:
        if str(file) == "-":
            read_in.append((file, read(console.decode(sys.stdin.buffer.read(), "stdin"), "stdin")))
        else:
            read_in.append((file, read(console.file_text(file), str(file))))
    with Store.open() as store:
        made = store.adopt(tree for _, imported in read_in for tree in imported.trees)
    for file, imported in read_in:
        console.note(f"{file}: {_count(imported.trees)} out of {imported.source}")
        for sentence in imported.notes:
            console.note(f"  {sentence}")
    for talk in made:
        print(_row(talk))


@app.command()
def rename(id: Id, title: Annotated[str, typer.Argument(help="The new title.")]) -> None:
    """Call a conversation something else."""
    with Store.open() as store:
        store.rename(store.find(id).id, console.check_text(title, "the title"))


@app.command()
def rm(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids, or their beginnings.", metavar="[IDS]...")] = None,
    every: Annotated[bool, typer.Option("--all", help="All conversations.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Remove conversations for good; on a terminal it asks first."""
    with Store.open() as store:
        talks = _chosen(store, ids or [], every)
        for talk in talks:
            console.message(_row(talk))
        if not yes and talks:
            if not console.is_terminal(sys.stdin):
                raise RequestError("there is no terminal to ask whether these shall go", hint="--yes removes them")
            typer.confirm(f"Remove {_count(talks)}?", abort=True, err=True)
        for talk in talks:
            store.delete(talk.id)
        console.note(f"removed {_count(talks)}")


def _chosen(store: Store, ids: Sequence[str], every: bool) -> list[Conversation]:
    if every == bool(ids):
        raise typer.BadParameter("give ids, or --all", param_hint="IDS")
    if every:
        return store.conversations(limit=_ALL)
    return list({talk.id: talk for talk in map(store.find, ids)}.values())


def _row(talk: Conversation) -> str:
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(talk.updated))
    return _clean(f"{talk.short_id}  {changed}  {talk.model or '-'}  {' '.join(talk.title.split()) or '(no title)'}")


def _label(message: StoredMessage) -> str:
    calls = [call.get("function", {}).get("name") for call in message.extra.get("tool_calls") or ()]
    return f"{message.role}, calling {', '.join(map(str, calls))}" if calls else message.role


def _clean(text: str) -> str:
    """What may go to stdout: a terminal gets no control characters out of a message."""
    return console.printable(text) if console.is_terminal(sys.stdout) else text


def _count(things: Sequence[Conversation] | Sequence[Tree]) -> str:
    return "1 conversation" if len(things) == 1 else f"{len(things)} conversations"


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
