"""`qwenlet chat`: a conversation on a terminal, or one answer on stdout for scripts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenlet.cli import console
from qwenlet.cli.conversation import NOT_FOR_CHAT, Conversation, State, read
from qwenlet.cli.options import EngineFlags, Flags, LoadFlags, adapter_names, expand, new_app
from qwenlet.config import SamplingParams
from qwenlet.errors import RequestError
from qwenlet.hub.names import DEMO

if TYPE_CHECKING:
    from qwenlet.api import LLM

app = new_app()


@app.command()
@expand
def chat(
    model: Annotated[
        str | None,
        typer.Argument(help=f"A folder, a .gguf file, a name on the hub, or {DEMO}. [default: {DEMO}]"),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this once on stdout and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; an empty text for none.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show counts and speed after each reply.")] = False,
    no_history: Annotated[bool, typer.Option("--no-history", help="Don't remember typed lines in a file.")] = False,
    *,
    sampling: Annotated[dict[str, Any], Flags(SamplingParams, skip=(*NOT_FOR_CHAT, "adapter"))],
    loading: LoadFlags,
    engine: EngineFlags,
) -> None:
    """Talk to a model: a conversation on a terminal, or one answer for scripts.

    Text piped into stdin is the prompt; with --prompt it follows the prompt after a blank line. Commands inside the
    conversation begin with a slash: /help lists them.
    """
    question = _question(prompt)
    if question is None and not console.is_terminal(sys.stdout):
        raise RequestError("a conversation needs a terminal, and stdout is none", hint="ask one question with --prompt")
    if system is not None:
        console.check_text(system, "--system")
    held_with, saved = (DEMO, None) if load is None else read(load)
    names = adapter_names(loading)
    if names:  # the first one speaks; /set adapter NAME calls another
        sampling["adapter"] = names[0]
    # what this command line says outweighs the file
    params = replace(saved.params if saved else SamplingParams(), **sampling)
    model = model or held_with

    from qwenlet.api import load as load_model  # only now, because it takes seconds

    with console.Progress() as progress:
        llm = load_model(model, progress=progress.update, **loading, **engine)
    with llm:
        state = replace(saved, params=params) if saved else State(llm.default_system, params)
        if system is not None:
            state = replace(state, system=system)
        conversation = Conversation(model, state)
        if question is None:
            _converse(llm, conversation, stats=stats, keep_history=not no_history)
        else:
            _answer(llm, conversation, question, stats=stats)


def _question(prompt: str | None) -> str | None:
    """The one question to answer, from the flag and stdin together; None for a conversation."""
    piped = console.piped_text()
    parts = [] if prompt is None else [console.check_text(prompt, "--prompt")]
    if piped is not None and (piped.strip() or not parts):
        parts.append(piped)
    if not parts:
        return None
    question = "\n\n".join(parts)
    if not question.strip():
        raise RequestError("the prompt is empty", hint='give it with --prompt "..." or pipe it into stdin')
    return question


def _answer(llm: LLM, conversation: Conversation, question: str, *, stats: bool) -> None:
    from qwenlet.cli.session import Session

    reply = Session(llm, conversation, stats=stats).ask(question)
    if reply.finish_reason == "cancelled":
        raise typer.Exit(console.INTERRUPTED)


def _converse(llm: LLM, conversation: Conversation, *, stats: bool, keep_history: bool) -> None:
    from qwenlet.cli import repl
    from qwenlet.cli.session import Session

    session = Session(llm, conversation, stats=stats)
    console.message(session.model_line, style="bold")
    if conversation.model == DEMO:
        console.note(
            "This is the demo model: SmolLM2, 135 million parameters, English. For Qwen-1.8B-Chat itself:\n"
            "  qwenlet chat Qwen/Qwen-1_8B-Chat"
        )
    if llm.chat_format == "raw":
        console.note("This model was not trained to chat; qwenlet generate continues a text instead.")
    if conversation.exchanges:
        console.note(f"{conversation.length} loaded; /history shows it.")
    console.note("/help lists the commands; Ctrl-C stops a reply; Ctrl-D leaves.")
    repl.run(session, keep_history=keep_history)
