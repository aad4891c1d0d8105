"""`qwenlet vocab extend`: words of your own as single tokens, in an extra vocabulary file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenlet.cli import console
from qwenlet.cli.options import new_app
from qwenlet.errors import RequestError

app = new_app()


@app.callback()
def vocab() -> None:
    """Extend a vocabulary with words of your own."""


@app.command()
def extend(
    words: Annotated[
        Path, typer.Argument(help="A UTF-8 file with one word a line, or a word, a tab and its frequency.")
    ],
    tokenizer: Annotated[str, typer.Option(help="A qwen.tiktoken file, or a model as for chat.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("qwen_extra.tiktoken"),
    start_id: Annotated[
        int | None, typer.Option(help="The id of the first new token; the first free one if unset.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Learn the merges that make each word one token, and write them to a file.

    Text without the new words keeps its ids. Put the file beside qwen.tiktoken to use it.
    """
    from qwenlet.cli.tokenize import load_tokenizer
    from qwenlet.vocabulary import learn_merges, read_word_list, write_extra_vocab

    if out.exists() and not force:
        raise RequestError(f"{out} exists already", hint="choose another name with --out, or overwrite it with --force")
    word_list = read_word_list(words)
    learned = learn_merges(load_tokenizer(tokenizer, offline), word_list, start_id)
    for skipped in learned.skipped:
        console.note(f"left out {skipped.word!r}: {skipped.reason}")
    if not learned.merges:
        raise RequestError(f"{words} has no word that could be added", hint="nothing was written")
    write_extra_vocab(out, learned.merges)
    first, last = learned.merges[0][1], learned.merges[-1][1]
    console.note(f"{len(learned.merges)} new tokens with ids {first} to {last}")
    print(out)
