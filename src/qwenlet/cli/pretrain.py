"""`qwenlet pretrain`: a model learns to read, from nothing or further."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.finetune import report as report_outcome
from qwenlet.cli.finetune import show_memory, show_time
from qwenlet.cli.options import Flags, expand, new_app
from qwenlet.cli.random import MODELS
from qwenlet.config import ModelConfig, TrainingConfig
from qwenlet.errors import ConfigError

if TYPE_CHECKING:
    from qwenlet.tokenizer_formats import Vocabulary
    from qwenlet.train.pretrain import Report

app = new_app()


@app.command()
@expand
def pretrain(
    data: Annotated[list[Path], typer.Argument(help="Files of text: .jsonl with a text each, or plain text.")],
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted run goes on there.")],
    training: Annotated[dict[str, Any], Flags(TrainingConfig)],
    model: Annotated[str | None, typer.Option(help="Go on with this checkpoint instead of beginning anew.")] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json of the model to begin with.")] = None,
    like: Annotated[
        str, typer.Option(help=f"A shape by name instead, which the sizes change. One of: {', '.join(MODELS)}.")
    ] = "qwen-1.8b",
    layers: Annotated[int | None, typer.Option(min=1, help="Its layers.")] = None,
    hidden: Annotated[int | None, typer.Option(min=4, help="Its width.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Its attention heads.")] = None,
    inner: Annotated[int | None, typer.Option(min=1, help="The width of its feed-forward.")] = None,
    tied: Annotated[bool, typer.Option("--tied", help="One table for embedding and head.")] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A qwen.tiktoken file, or a model as for chat, whose vocabulary a new model gets."),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=259, help="So many tokens of it: those that merge first.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a piece; a new model's training length.")] = 256,
    held_out: Annotated[float, typer.Option(help="Share of the documents to measure on and not to learn.")] = 0.02,
    eval_data: Annotated[list[Path] | None, typer.Option(help="Files of text to measure on instead.")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Orders of n-gram counts to compare with, or none; 1, 3 and 5 unless given."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="How a sample begins that the model writes at the end.")] = "",
    device: Annotated[str, typer.Option(help="Where to train: auto, cpu, cuda, cuda:1 ...")] = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Train a model on text, from nothing or further.

    No token sees another document. OUT gets the checkpoint, and OUT/training the log, the picture of the loss and a
    report: the loss on what was held out beside that of n-gram counts, and a sample with what of it stands in the text.
    """
    from qwenlet.train.pretrain import PretrainJob
    from qwenlet.train.pretrain import pretrain as do

    orders = _orders(baseline or ["1", "3", "5"])
    made, words = None, None
    if model is None:
        if tokenizer is None:
            raise ConfigError(
                "a model from nothing needs a vocabulary", hint="give --tokenizer qwen.tiktoken, or a model"
            )
        words = _vocabulary(tokenizer, vocabulary, offline)
        made = _config(config, like, words, length, layers, hidden, heads, inner, tied)
    with console.Progress("steps") as progress:
        report = do(
            PretrainJob(
                data=data,
                out=out,
                model=model,
                config=made,
                vocabulary=words,
                length=length,
                held_out=held_out,
                eval_data=eval_data or (),
                training=TrainingConfig(**training),
                baselines=orders,
                prompt=prompt,
                device=device,
                offline=offline or None,
            ),
            foreseen=show_memory,
            planned=show_time,
            progress=progress.update,
            note=console.note,
        )
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one tells
        return
    if report is None:
        console.note("stopped; the same command goes on there")
        raise typer.Exit(console.INTERRUPTED)
    _show(report, out)


def _orders(given: list[str]) -> tuple[int, ...]:
    if given == ["none"]:
        return ()
    if wrong := [word for word in given if not word.isascii() or not word.isdigit() or int(word) < 1]:
        raise typer.BadParameter(f"{wrong[0]!r} is no order: expected 1 or more, or none", param_hint="--baseline")
    return tuple(map(int, given))


def _config(
    file: Path | None,
    like: str,
    words: Vocabulary,
    length: int,
    layers: int | None,
    hidden: int | None,
    heads: int | None,
    inner: int | None,
    tied: bool,
) -> ModelConfig:
    from qwenlet.train.pretrain import sized

    if like not in MODELS:
        raise typer.BadParameter(f"{like!r} is not one of {', '.join(MODELS)}", param_hint="--like")
    if file is not None:
        return ModelConfig.from_file(file)
    end = () if words.eos_id is None else (words.eos_id,)
    return sized(
        MODELS[like](),
        vocab_size=-(-words.size // 64) * 64,  # rows in whole groups, as quantizing wants them
        seq_length=length,
        max_position_embeddings=length,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=inner,
        tie_word_embeddings=tied,
        eos_token_ids=end,
    )


def _vocabulary(source: str, size: int | None, offline: bool) -> Vocabulary:
    from qwenlet import hub
    from qwenlet.tokenizer import read_folder
    from qwenlet.tokenizer_formats import read_qwen
    from qwenlet.train.pretrain import cut_vocabulary

    path = Path(source)
    if path.suffix == ".tiktoken":
        whole, _ = read_qwen(path)
    else:
        whole = read_folder(hub.resolve(source, offline=offline or None))
    return whole if size is None else cut_vocabulary(whole, size)


def _show(report: Report, out: Path) -> None:
    counted = "; by counts alone:" if report.baselines else ""
    console.note(f"held-out loss {report.held_out:.3f} nats a token, over {report.tokens[1]:,} tokens{counted}")
    for order, loss in report.baselines.items():
        console.note(f"  {loss:.3f} {'of single tokens' if order == 1 else f'of the last {order - 1} tokens'}")
    console.note(f"{report.flops_share:.0%} of what this machine's products reach by themselves")
    if report.sample:
        share = len(report.overlap) / len(report.sample)
        console.note(
            f"a sample, of which {len(report.overlap)} characters ({share:.0%}) stand in the text in one piece:"
        )
        console.message(report.sample)
        console.note(f"that piece: {report.overlap!r}")
    report_outcome(report.outcome, out)
