"""`qwenlet generate`: a text goes on. No chat format, no system prompt; the continuation alone goes to stdout."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.loading import load
from qwenlet.cli.options import EngineFlags, Flags, LoadFlags, adapter_names, expand, new_app
from qwenlet.config import SamplingParams
from qwenlet.errors import RequestError

if TYPE_CHECKING:
    from qwenlet.engine import Completion
    from qwenlet.llm import LLM

app = new_app()


@app.command()
@expand
def generate(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a name on the hub, or demo.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text to continue.")] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Read control tokens written in the prompt, like <|im_start|>, as such.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per completion and line.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show counts and speed at the end.")] = False,
    *,
    sampling: Annotated[dict[str, Any], Flags(SamplingParams, skip=("adapter",))],
    loading: LoadFlags,
    engine: EngineFlags,
) -> None:
    """Continue a text, without any chat format.

    The text comes from --prompt, --prompt-file or stdin; one line break at the end of a file or of stdin is dropped.
    """
    text = _prompt(prompt, prompt_file)
    names = adapter_names(loading)
    params = SamplingParams(**sampling, adapter=names[0] if names else None)
    if params.logprobs is not None and not as_json:
        raise typer.BadParameter("log-probabilities are shown as JSON only: add --json", param_hint="--logprobs")

    with load(model, **loading, **engine) as llm:
        ids = llm.tokenizer.encode(text, allowed_special="all" if special else set())
        if as_json or params.n > 1:
            _complete(llm, ids, params, as_json=as_json)
        else:
            _stream(llm, ids, params, stats=stats)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give --prompt or --prompt-file, not both", param_hint="--prompt-file")
    if prompt_file is not None:
        text: str | None = console.file_text(prompt_file)
    elif prompt is not None:
        text = console.check_text(prompt, "--prompt")
    else:
        text = console.piped_text()
    if not text:
        raise RequestError("the prompt is empty", hint="give it with --prompt, --prompt-file or on stdin")
    return text


def _stream(llm: LLM, ids: list[int], params: SamplingParams, *, stats: bool) -> None:
    from qwenlet.cli.reply import show, stats_line

    reply = show(llm.stream(ids, params), sys.stdout)
    if stats and reply.last is not None:
        console.note(stats_line(reply.last))
    if reply.finish_reason == "cancelled":
        raise typer.Exit(console.INTERRUPTED)


def _complete(llm: LLM, ids: list[int], params: SamplingParams, *, as_json: bool) -> None:
    result = llm.generate(ids, params)
    clean = console.printable if console.is_terminal(sys.stdout) else str
    for index, completion in enumerate(result if isinstance(result, list) else [result]):
        if as_json:
            print(json.dumps(_record(completion), ensure_ascii=False))
        else:
            print("---\n" * (index > 0) + clean(completion.text))


def _record(completion: Completion) -> dict[str, Any]:
    from qwenlet.cli.reply import timings

    record = dataclasses.asdict(completion)
    record["completion_tokens"] = completion.completion_tokens
    record["timings"] = timings(completion.timings)
    return record
