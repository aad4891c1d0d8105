"""`qwenlet convert`: a checkpoint in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenlet.cli import console
from qwenlet.cli.options import new_app

app = new_app()


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model as for chat: a folder, a .gguf file, a name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; with --to gguf the file.")],
    to: Annotated[
        str,
        typer.Option(
            help="The layout to write: qwen, as first published; qwen2, which transformers, vLLM and SGLang load; "
            "gguf, for llama.cpp; own, a folder in the layout of the model's own type."
        ),
    ] = "qwen",
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32, for gguf also q8_0 or q4_0; as in the source unless given."),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Of a GGUF file: qwen or qwen2; the model's own unless given.")
    ] = None,
    dynamic_rope: Annotated[
        bool,
        typer.Option("--dynamic-rope", help="With --to qwen2: ask for transformers' dynamic NTK beyond 8,192 tokens."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the result, and compare its logits with the source's.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Write a checkpoint in another layout."""
    from qwenlet import checkpoint, hub

    with console.Progress() as progress:
        found = hub.resolve(source, offline=offline or None, progress=progress.update)
        path = checkpoint.convert(
            found,
            out,
            to=to,
            dtype=dtype,
            architecture=architecture,
            dynamic_rope=dynamic_rope,
            progress=progress.update,
        )
    for sentence in checkpoint.left_behind(checkpoint.Checkpoint.open(found).config, to):
        console.note(sentence)
    if verify:
        from qwenlet.verify import verify as compare

        for result in compare(found, path):
            console.note(str(result))
    print(path)
