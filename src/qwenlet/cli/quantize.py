"""`qwenlet quantize`: a checkpoint in four or eight bits, and what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwenlet.cli import console
from qwenlet.cli.options import Flags, expand, new_app
from qwenlet.config import QuantConfig

if TYPE_CHECKING:
    from qwenlet.config import ModelConfig
    from qwenlet.errors import MissingTokenizerError
    from qwenlet.quant.calibration import Calibration
    from qwenlet.quant.outcome import Outcome
    from qwenlet.tokenizer import Tokenizer

HALF = 16  # on the command line, what stays in half precision

app = new_app()


@app.command()
@expand
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model as for chat: a folder, a .gguf file, a name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    quant: Annotated[
        dict[str, Any],
        Flags(
            QuantConfig,
            skip=(
                "group_size",
                "method",
                "desc_act",
                "static_groups",
                "head_bits",
                "head_group_size",
                "embedding_bits",
            ),
        ),
    ],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Input columns that share a scale: 32, 64 or 128; the largest that divides every layer unless given."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="gptq calibrates on a text; rtn rounds to nearest, in seconds.")] = "gptq",
    desc_act: Annotated[
        bool | None,
        typer.Option(
            "--desc-act/--no-desc-act",
            help="GPTQ rounds the most active inputs first (act-order); it does unless told otherwise.",
        ),
    ] = None,
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help="GPTQ fixes the groups' scales first. Columns then stay where they are, so that their order costs no "
            "time when the model runs; as --desc-act unless given.",
        ),
    ] = None,
    head_bits: Annotated[
        int | None, typer.Option(help=f"Of the output head: 4, 8, or {HALF} to leave it; as --bits unless given.")
    ] = None,
    head_group_size: Annotated[
        int | None,
        typer.Option(help="The same of the head; 32 in four bits, else the largest that divides, unless given."),
    ] = None,
    embedding_bits: Annotated[int, typer.Option(help=f"Of the embedding: 8, or {HALF} to leave it.")] = 8,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="What GPTQ looks at: .json as for fine-tuning, .jsonl, plain text, or a part of the built-in samples "
            "(builtin, english, chinese, dialogues). All built-in samples unless given; your own text is better.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples of the calibration text.")] = 128,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample at most.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Which samples are picked.")] = 0,
    text: Annotated[
        Path | None, typer.Option(help="A text to measure the quality on; a short built-in one unless given.")
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Measure what it cost.")] = True,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Write a model in four or eight bits, and measure what it cost.

    An interrupted run goes on where it stopped when the same command is given again; so does its report.
    """
    from qwenlet import hub
    from qwenlet.checkpoint import Checkpoint, head_obstacle, read_tokenizer
    from qwenlet.quant.pipeline import unmeasured

    calibrated = _method(method) == "gptq"
    if not calibrated:
        _refuse({"--desc-act": desc_act, "--static-groups": static_groups, "--calibration": calibration})
    bits = quant.get("bits", QuantConfig.bits)
    head = bits if head_bits is None else head_bits
    ordered = calibrated and desc_act is not False
    config = QuantConfig(
        **quant,
        group_size=group_size,
        method=_method(method),
        desc_act=ordered,
        static_groups=ordered if static_groups is None else static_groups,
        head_bits=_or_half(head),
        head_group_size=head_group_size or (QuantConfig.head_group_size if head == 4 else None),
        embedding_bits=_or_half(embedding_bits),
    )
    words = None if text is None else console.file_text(text)
    with console.Progress() as progress:
        found = hub.resolve(source, offline=offline or None, progress=progress.update)
    checkpoint = Checkpoint.open(found)
    tokenizer = read_tokenizer(checkpoint)
    window = _window(checkpoint.config, tokenizer, words) if report else 0
    obstacle = head_obstacle(config, checkpoint.config)
    if obstacle is not None:
        console.note(f"the head stays in half precision: {obstacle}")
    picked = _calibration(tokenizer, calibration, samples, max_length, seed) if calibrated else None
    outcome = unmeasured(found, out, config, picked) if report else None
    if outcome is None:
        outcome = _quantized(found, out, config, picked)
    else:
        console.note(f"{outcome.path} is written already, and only its report is missing")
    if report:
        _report(found, outcome, words, None if text is None else text.name, window)
    print(outcome.path)


def _refuse(given: dict[str, object]) -> None:
    """Options of GPTQ's beside another method."""
    for option, value in given.items():
        if value is not None and value is not False:
            raise typer.BadParameter("only --method gptq looks at inputs; leave it out", param_hint=option)


def _quantized(found: Path, out: Path, config: QuantConfig, picked: Calibration | None) -> Outcome:
    """Quantizes, and says what is worth knowing of it."""
    from qwenlet.quant.pipeline import quantize

    with console.Progress("steps") as progress:
        try:
            outcome = quantize(found, out, config, picked, progress=progress.update)
        except KeyboardInterrupt:
            if picked is not None:
                console.note("finished layers are kept beside OUT: the same command goes on there")
            raise
    if outcome.resumed:
        console.note(f"went on after {outcome.resumed} finished layers of an earlier run")
    for error in outcome.errors:
        if error.damp_percent is not None and error.damp_percent > config.damp_percent:
            console.note(f"{error.name} needed damping of {error.damp_percent:.0%}; more calibration text may help")
    return outcome


def _method(name: str) -> Literal["gptq", "rtn"]:
    if name not in ("gptq", "rtn"):
        raise typer.BadParameter(f"{name!r} is not gptq or rtn", param_hint="--method")
    return name  # type: ignore[return-value]


def _or_half(bits: int) -> int | None:
    return None if bits == HALF else bits


def _window(model: ModelConfig, tokenizer: Tokenizer | MissingTokenizerError, text: str | None) -> int:
    """Tokens of a window that quality is measured on. Raises RequestError where the text fills none."""
    from qwenlet.quant.report import built_in_text
    from qwenlet.scoring import WINDOW, windows

    window = min(WINDOW, model.context_length)
    if not isinstance(tokenizer, Exception):
        windows(tokenizer.encode(text or built_in_text(), allowed_special=set()), window)
    return window


def _calibration(
    tokenizer: Tokenizer | MissingTokenizerError, source: str | None, samples: int, max_length: int, seed: int
) -> Calibration:
    from qwenlet.quant.calibration import load_calibration

    if isinstance(tokenizer, Exception):
        raise tokenizer
    return load_calibration(source, tokenizer, samples=samples, max_length=max_length, seed=seed)


def _report(model: Path, outcome: Outcome, text: str | None, name: str | None, window: int) -> None:
    """Measures the written model beside its source, as users get both; JSON beside the weights, a table on stderr."""
    from qwenlet import api
    from qwenlet.errors import MissingTokenizerError
    from qwenlet.quant.report import measure_quality

    try:
        with (
            console.Progress("steps") as progress,
            api.load(str(model), device="cpu", quant="none", offline=True) as reference,
            api.load(str(outcome.path), device="cpu", offline=True) as quantized,
        ):
            measured = measure_quality(
                reference,
                quantized,
                outcome.quant,
                text,
                text_name=name,
                window=window,
                layer_errors={error.name: error.error for error in outcome.errors},
                calibration=outcome.seen,
                progress=progress.update,
            )
    except MissingTokenizerError:
        console.note("the model has no vocabulary, so its quality can't be measured on a text")
        return
    except KeyboardInterrupt:
        console.note("OUT is written: the same command makes the report")
        raise
    measured.save(outcome.path)
    outcome.measured()
    console.stderr().print(measured.table())
