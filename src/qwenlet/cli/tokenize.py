"""`qwenlet tokenize`: ids and pieces of a text, or the text of ids. Needs a vocabulary, no weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenlet.cli import console
from qwenlet.cli.options import new_app
from qwenlet.errors import RequestError

if TYPE_CHECKING:
    from qwenlet.tokenizer import Tokenizer

app = new_app()


@app.command()
def tokenize(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A model as for chat, or a qwen.tiktoken file.")],
    text: Annotated[str | None, typer.Argument(help="The text; without it, stdin is read.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="TEXT holds token ids; print the text they stand for.")] = False,
    special: Annotated[
        bool, typer.Option("--special", help="Read control tokens written in the text, like <|im_start|>, as such.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: count, ids, pieces.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Only the number of tokens.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Show the tokens of a text, or the text of token ids.

    One line per token: the id, a tab, the piece. A piece that is only part of a character is shown as its bytes.
    """
    source = console.check_text(text, "TEXT") if text is not None else console.piped_text()
    if source is None:
        raise RequestError("there is no text", hint="give it as the second argument or pipe it into stdin")
    tokenizer = load_tokenizer(model, offline)
    numbers = _parse_ids(source) if ids else tokenizer.encode(source, allowed_special="all" if special else set())
    if count:
        print(len(numbers))
    elif as_json:
        pieces = [
            {"id": i, "text": _text(raw), "hex": raw.hex()} for i in numbers for raw in [tokenizer.token_bytes(i)]
        ]
        print(json.dumps({"count": len(numbers), "ids": numbers, "pieces": pieces}, ensure_ascii=False))
    elif ids:
        decoded = tokenizer.decode(numbers)
        print(console.printable(decoded) if console.is_terminal(sys.stdout) else decoded)
    else:
        for number in numbers:
            print(f"{number}\t{_shown(tokenizer.token_bytes(number))}")


def load_tokenizer(name: str, offline: bool) -> Tokenizer:
    """The tokenizer of a vocabulary file, a .gguf file, a folder, or a model by name (fetched if it is not here)."""
    from qwenlet import hub
    from qwenlet.gguf_header import is_gguf, read_header
    from qwenlet.tokenizer import Tokenizer

    with console.Progress() as progress:
        path = Path(hub.resolve(name, offline=offline or None, progress=progress.update))
    if path.is_dir():
        return Tokenizer.from_folder(path)
    if is_gguf(path):
        return Tokenizer.from_gguf(read_header(path).metadata, str(path))
    return Tokenizer.from_file(path)


def _parse_ids(text: str) -> list[int]:
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    wrong = next((word for word in words if not (word.isascii() and word.isdigit())), None)
    if wrong is not None:
        raise RequestError(f"{wrong!r} is not a token id", hint="ids are whole numbers with spaces or commas between")
    return [int(word) for word in words]


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _shown(piece: bytes) -> str:
    text = _text(piece)
    return repr(piece if text is None else text)
