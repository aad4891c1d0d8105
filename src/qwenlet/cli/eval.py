"""`qwenlet eval`: benchmarks of a model at one precision or several, and what to do with their results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.loading import load as load_model
from qwenlet.cli.options import EngineFlags, Flags, LoadOptions, expand, new_app

if TYPE_CHECKING:
    from qwenlet.evals.run import Outcome, Progress
    from qwenlet.llm import LLM

CACHE_TOKENS = 16384  # unless --cache-tokens says otherwise: enough for many samples at once
_LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal

evaluating, comparing, reporting, listing = new_app(), new_app(), new_app(), new_app()


def app(arguments: Sequence[str], prog_name: str, standalone_mode: bool) -> Any:
    """`eval TASK...`, or one of the words that do something with results."""
    word = arguments[0] if arguments else ""
    if word in _WORDS:
        return _WORDS[word](list(arguments[1:]), prog_name=f"{prog_name} {word}", standalone_mode=standalone_mode)
    return evaluating(list(arguments), prog_name=prog_name, standalone_mode=standalone_mode)


@evaluating.command()
@expand
def evaluate(
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASK...", help="Names of tasks; `qwenlet eval list` shows them.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="A model as for chat: a folder, a .gguf file, a name.")],
    data_dir: Annotated[Path, typer.Option(help="The folder of data sets, each under its own name.")],
    out: Annotated[Path, typer.Option(help="The folder of the run; one that is there goes on.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many samples of each task, a fixed choice of them.")
    ] = None,
    precisions: Annotated[
        str, typer.Option(help="One or several, with commas between: fp32, fp16, bf16, int8, int4, as-is.")
    ] = "as-is",
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples and of sampled replies.")] = 1234,
    unchecked_data: Annotated[
        bool, typer.Option("--unchecked-data", help="Use data files that differ from the published ones.")
    ] = False,
    *,
    loading: Annotated[dict[str, Any], Flags(LoadOptions, skip=("dtype", "quant"))],
    engine: EngineFlags,
) -> None:
    """Run benchmarks, and report them beside the published figures.

    A run that was interrupted goes on where it stopped when the same command is given again. With results: `qwenlet
    eval compare A B` tests whether two runs differ, `qwenlet eval report RUN` writes the report again, and `qwenlet
    eval list` names the tasks.
    """
    from qwenlet.evals.data import DataFolder
    from qwenlet.evals.report import report, save
    from qwenlet.evals.run import PRECISIONS, Run

    engine.setdefault("cache_tokens", max(CACHE_TOKENS, engine.get("max_context", 0)))

    def load(precision: str) -> LLM:
        return load_model(model, **loading, **PRECISIONS[precision], **engine)

    name = Path(model).name if Path(model).exists() else model
    run = Run(out, DataFolder(data_dir, unchecked_data), name, limit, seed, note=console.note)
    with _Told() as told:
        outcomes = run.evaluate(tasks, load, [word.strip() for word in precisions.split(",")], told.update)
    for outcome in outcomes:
        _show(outcome)
    for path in save(report(out), out):
        print(path)


class _Told:
    """Progress for people: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar = console.Progress("steps")
        self._running = ""
        self._told = 0.0

    def update(self, now: Progress) -> None:
        what = f"{now.task} {now.precision}"
        if what != self._running:
            self._bar.close()
            self._bar, self._running = console.Progress("steps"), what
        text = f"{what}: {now.score:.4g}"
        self._bar.update(now.done, now.total, text)
        if not console.is_terminal(sys.stderr):
            self._line(now, text)

    def _line(self, now: Progress, text: str) -> None:
        import time

        if now.done < now.total and time.monotonic() - self._told < _LINE_SECONDS:
            return
        self._told = time.monotonic()
        left = "" if not now.seconds_left else f", {now.seconds_left:,.0f} s left"
        console.message(f"{text}, {now.done} of {now.total}{left}")

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


def _show(outcome: Outcome) -> None:
    """The main figures of one task, on stderr."""
    figures = [figure for figure in outcome.summary.figures if not figure.part]
    shown = ", ".join(f"{figure.name} {figure.text()}" for figure in figures)
    console.message(f"{outcome.title}, {outcome.precision}, {outcome.count} of {outcome.available}: {shown}")
    for rule, ids in outcome.unread.items():
        console.note(f"  the {rule} rule found no answer in {len(ids)} replies: {_some(ids)}")
    for rule, ids in outcome.guessed.items():
        console.note(f"  the {rule} rule guessed {len(ids)} times: {_some(ids)}")
    if outcome.unanswered:
        console.note(f"  {len(outcome.unanswered)} samples have no answer: {_some(list(outcome.unanswered))}")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (" ..." if len(ids) > 3 else "")


@comparing.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A run: its folder, or FOLDER:PRECISION.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another, or the same at another precision.")],
) -> None:
    """Test whether two runs over the same samples differ.

    Right and wrong answers by McNemar's exact test, other measures by a bootstrap over samples.
    """
    from qwenlet.evals.compare import compare

    for one in compare(first, second):
        result = one.result
        print(
            f"{one.task}, {one.measure}: {one.first} {result.first:.4f}, {one.second} {result.second:.4f}, difference "
            f"{result.difference:+.4f} ± {result.error:.4f} (95 %: {result.low:+.4f} to {result.high:+.4f}), better "
            f"{result.better}, worse {result.worse} of {result.count}, p = {result.p_value:.4f} ({result.test})"
        )
        if one.left_out:
            console.note(f"  {one.left_out} samples are in one run only, or were asked differently")


@reporting.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
) -> None:
    """Write the report of a run again: Markdown, JSON, and a page with plots."""
    from qwenlet.evals.report import report, save

    for path in save(report(run), run):
        print(path)


@listing.command()
def list_tasks() -> None:
    """Name the tasks."""
    from qwenlet.evals import tasks

    for name in tasks.TASKS:
        print(f"{name:20}  {tasks.get(name).title}")


_WORDS = {"compare": comparing, "report": reporting, "list": listing}
# what a shell completes: the words stand where a task does, and whose options they have it can't know
COMPLETED = evaluating
