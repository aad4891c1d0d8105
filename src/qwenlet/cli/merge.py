"""`qwenlet merge`: an adapter into a checkpoint's weights, and what that changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenlet.cli import console
from qwenlet.cli.options import new_app
from qwenlet.config import QuantConfig

if TYPE_CHECKING:
    from qwenlet.scoring import Logits

app = new_app()
_NAME = "merged"


@app.command()
def merge(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="What was adapted: a folder, a .gguf file, a name.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; with --to gguf the file.")],
    to: Annotated[
        str, typer.Option(help="The layout to write: own, the model's own; or as for qwenlet convert.")
    ] = "own",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; as in MODEL unless given.")] = None,
    trained_beside: Annotated[
        str | None,
        typer.Option(
            metavar="int4|int8",
            help="Of an adapter trained with Q-LoRA on a model that was rounded while it was loaded: add it to the "
            "weights as they were rounded. Without it they are MODEL's own, as stored.",
        ),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="int4|int8",
            help="Round the result to nearest. For GPTQ, merge without it and run qwenlet quantize on OUT.",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Measure perplexity before, with the adapter, and after.")
    ] = True,
    text: Annotated[Path | None, typer.Option(help="A text to measure on; a short built-in one unless given.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Write a model with an adapter merged into its weights, and measure what that changed."""
    from qwenlet import hub
    from qwenlet.checkpoint import Checkpoint, head_obstacle
    from qwenlet.lora.merge import merge as merge_into

    beside = None if trained_beside is None else QuantConfig.named(trained_beside)
    rounded = None if quant is None else QuantConfig.named(quant)
    words = None if text is None else console.file_text(text)
    with console.Progress() as progress:
        found = hub.resolve(source, offline=offline or None, progress=progress.update)
        path = merge_into(
            found, adapter, out, to=to, dtype=dtype, beside=beside, quant=rounded, progress=progress.update
        )
    obstacle = None if rounded is None else head_obstacle(rounded, Checkpoint.open(path).config)
    if obstacle is not None:
        console.note(f"the head stays in half precision: {obstacle}")
    if report:
        _report(found, adapter, path, trained_beside, words)
    print(path)


def _report(model: Path, adapter: Path, merged: Path, beside: str | None, text: str | None) -> None:
    """Perplexities on stderr: the model, the adapter running beside it, and what was written."""
    from qwenlet import api, scoring
    from qwenlet.errors import CheckpointError, MissingTokenizerError
    from qwenlet.quant.report import built_in_text

    rows: list[tuple[str, Logits]] = []
    with console.Progress("steps") as progress, api.load(str(model), quant=beside, offline=True) as before:
        try:
            ids = before.tokenizer.encode(text or built_in_text(), allowed_special=set())
        except MissingTokenizerError:
            console.note("the model has no vocabulary, so the difference can't be measured on a text")
            return
        rows.append(("the model", before.logits))
        try:
            before.add_adapter(_NAME, adapter)
            rows.append(("adapter beside it", lambda ids: before.logits(ids, adapter=_NAME)))
        except CheckpointError as problem:
            console.note(f"not measured beside the model: {problem.message}")
        with api.load(str(merged), offline=True) as after:
            rows.append(("merged", after.logits))
            pieces = scoring.windows(ids)
            measured = [(name, scoring.perplexity(logits, pieces, progress=progress.update)) for name, logits in rows]
    width = max(len(name) for name, _ in measured)
    first = measured[0][1].value
    for name, one in measured:
        change = "" if one.value == first else f" ({100 * (one.value / first - 1):+.2f} %)"
        console.note(f"perplexity  {name:{width}}  {one.value:.3f} ± {one.error:.3f}{change}")
