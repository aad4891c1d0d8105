"""`qwenlet finetune`: a model learns from examples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.options import Flags, expand, new_app
from qwenlet.config import DataConfig, LoraConfig, TrainingConfig

if TYPE_CHECKING:
    from qwenlet.train.finetune import Finetune
    from qwenlet.train.planning import Plan
    from qwenlet.train.samples import Samples
    from qwenlet.train.trainer import Outcome

app = new_app()


@app.command()
@expand
def finetune(
    model: Annotated[str, typer.Argument(help="A model as for chat: a folder, a .gguf file, a name.")],
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Files of examples: conversations, messages, ShareGPT, Alpaca, prompt and completion, or text; .json, "
            ".jsonl or plain text. For dpo: pairs with chosen and rejected."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted run goes on there.")],
    samples: Annotated[dict[str, Any], Flags(DataConfig)],
    training: Annotated[dict[str, Any], Flags(TrainingConfig)],
    lora: Annotated[dict[str, Any], Flags(LoraConfig, skip=("alpha_pattern",))],
    method: Annotated[
        str,
        typer.Option(
            help="full moves every weight; lora trains an adapter, qlora over weights of four bits; dpo trains one on "
            "pairs of a chosen and a rejected reply, dpo-full every weight on them."
        ),
    ] = "lora",
    eval_data: Annotated[list[Path] | None, typer.Option(help="Examples to measure on, not to learn.")] = None,
    held_out: Annotated[
        float, typer.Option(min=0, help="A share of the data, or from 1 on a number of samples, to measure on instead.")
    ] = 0.0,
    adapter: Annotated[Path | None, typer.Option(help="Train this adapter further.")] = None,
    quant: Annotated[str, typer.Option(help="How qlora rounds weights that are floats: int4 or int8.")] = "int4",
    preview: Annotated[
        int, typer.Option(min=0, help="Show so many samples with what is learned of them, and end.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read, check and plan, and end.")] = False,
    device: Annotated[str, typer.Option(help="Where to train: auto, cpu, cuda, cuda:1 ...")] = "auto",
    revision: Annotated[str | None, typer.Option(help="A commit, tag or branch of the model on the hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Teach a model from examples: all of it, or a small adapter beside it.

    OUT gets the adapter (in peft's format) or the checkpoint, and in OUT/training the log, the picture of the loss and
    what the run needs to go on. Several processes: torchrun --nproc-per-node 2 -m qwenlet finetune ...
    """
    from qwenlet.train.finetune import Job
    from qwenlet.train.finetune import finetune as do

    job = Job(
        model=model,
        data=data,
        out=out,
        method=method,  # type: ignore[arg-type]
        eval_data=eval_data or (),
        held_out=held_out,
        samples=DataConfig(**samples),
        training=TrainingConfig(**training),
        lora=LoraConfig(**lora),
        adapter=adapter,
        quant=quant,
        device=device,
        revision=revision,
        offline=offline or None,
    )

    def before(made: Finetune) -> bool:
        if preview:
            show_samples(made.samples, made.tokenizer, preview)
            return False
        show_memory(made.plan)
        return True

    def planned(plan: Plan) -> bool:
        show_time(plan)
        return not dry_run

    with console.Progress("steps") as progress:
        outcome = do(job, before=before, planned=planned, progress=progress.update, note=console.note)
    if outcome is not None and os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        report(outcome, out)


def show_samples(samples: Samples, tokenizer: Any, count: int) -> None:
    """On stdout: what is learned in green, and between brackets where there is no colour."""
    from rich.console import Console
    from rich.text import Text

    from qwenlet.train.preview import pieces

    screen = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    coloured = screen.is_terminal and not screen.no_color
    for index in range(min(count, len(samples))):
        ids, learned = samples[index]
        screen.print(f"--- {samples.where[index]}: {len(ids)} tokens, {int(learned.sum())} learned", style="bold")
        text = Text()
        for piece, mark in pieces(samples, index, tokenizer):
            shown = console.printable(piece)
            if coloured:
                text.append(shown, style="green" if mark else "dim")
            else:
                text.append(f"[[{shown}]]" if mark else shown)
        screen.print(text)


def show_memory(plan: Plan) -> None:
    """Before weights are loaded, as a process that takes too much is ended without a word."""
    forecast = plan.forecast
    console.note(
        f"{plan.learning:,} of {plan.all:,} parameters learn; computed again: {plan.recompute}; expected peak "
        f"{console.size(plan.peak)}: weights {console.size(forecast.frozen)}, what learns "
        f"{console.size(forecast.learning)}, activations {console.size(forecast.activations[plan.recompute])}, the "
        f"rest {console.size(forecast.runtime)}"
    )
    if plan.memory is not None and plan.peak > plan.memory:
        console.note(
            f"that is more than the {console.size(plan.memory)} available: a smaller --batch-size or length needs "
            "less, as do --method lora and qlora of finetune"
        )


def show_time(plan: Plan) -> None:
    spoken = "" if plan.seconds is None else f", some {duration(plan.seconds)} at the speed of two batches now"
    console.note(f"{plan.tokens:,} tokens in {plan.steps:,} steps{spoken}")


def duration(seconds: float) -> str:
    """For people: 75 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def report(outcome: Outcome, out: Path) -> None:
    if outcome.why == "interrupted":
        console.note(f"stopped after step {outcome.steps:,} of {outcome.planned:,}; the same command goes on there")
        raise typer.Exit(console.INTERRUPTED)
    best = (
        "" if outcome.best is None else f"; the best held-out loss is {outcome.best:.4f}, of step {outcome.best_step}"
    )
    early = f", no better one in {outcome.steps - (outcome.best_step or 0)} steps" if outcome.why == "patience" else ""
    speed = f"{outcome.tokens_per_second:,.0f} tokens/s"
    console.note(f"{outcome.steps:,} steps in {duration(outcome.seconds)}, {speed}{best}{early}")
    print(out)
