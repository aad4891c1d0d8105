"""`qwenlet random`: a checkpoint of random weights in the published layout, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenlet import config
from qwenlet.cli import console
from qwenlet.cli.options import new_app

MODELS = {"qwen-1.8b": config.qwen_1_8b}

app = new_app()


@app.command()
def random(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    like: Annotated[
        str, typer.Option(help=f"The model whose shape is taken. One of: {', '.join(MODELS)}.")
    ] = "qwen-1.8b",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16 unless given.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed gives the same weights; 0 unless given.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="So many layers instead of the model's own.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A qwen.tiktoken file to put beside the weights.")] = None,
) -> None:
    """Write a checkpoint of random weights, for tests and benchmarks.

    It has the size and speed of the real model and says nothing that makes sense.
    """
    if like not in MODELS:
        raise typer.BadParameter(f"{like!r} is not one of {', '.join(MODELS)}", param_hint="--like")
    from qwenlet import checkpoint

    shape = MODELS[like]()
    if layers is not None:
        shape = replace(shape, num_hidden_layers=layers)
    options: dict[str, Any] = {"dtype": dtype, "seed": seed, "tokenizer_file": tokenizer}
    used = {name: value for name, value in options.items() if value is not None}
    with console.Progress() as progress:
        path = checkpoint.write_random(out, shape, progress=progress.update, **used)
    console.note(f"{shape.parameter_count:,} random parameters in {shape.num_hidden_layers} layers")
    print(path)
