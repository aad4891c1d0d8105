"""`qwenlet chat`: a conversation on a terminal, or one answer on stdout for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenlet.cli import console, saved
from qwenlet.cli.attachments import attach as attach_files
from qwenlet.cli.conversation import NOT_FOR_CHAT, Conversation, State
from qwenlet.cli.keeper import Keeper
from qwenlet.cli.loading import load as load_model
from qwenlet.cli.options import EngineFlags, Flags, LoadFlags, adapter_names, expand, new_app
from qwenlet.config import SamplingParams
from qwenlet.errors import RequestError, StoreError
from qwenlet.hub.names import DEMO
from qwenlet.store import Store, Tree, is_off

if TYPE_CHECKING:
    from qwenlet.cli.calls import Caller
    from qwenlet.cli.reply import Reply
    from qwenlet.cli.session import Session

app = new_app()
OFF_HINT = "--no-history and QWENLET_NO_HISTORY=1 turn it off"


@app.command()
@expand
def chat(
    model: Annotated[
        str | None,
        typer.Argument(help=f"A folder, a .gguf file, a name on the hub, or {DEMO}. [default: {DEMO}]"),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this once on stdout and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; an empty text for none.")] = None,
    attach: Annotated[
        list[Path] | None,
        typer.Option("--attach", "-a", help="A text file to put below the question; may be repeated."),
    ] = None,
    go_on: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the last conversation.")] = False,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this conversation: an id, or its beginning, of qwenlet history.")
    ] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation out of a file.")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(help="A Python file of yours whose functions the model may call; each call is asked about."),
    ] = None,
    allow_calls: Annotated[bool, typer.Option("--allow-calls", help="Run the model's calls without asking.")] = False,
    max_calls: Annotated[int, typer.Option(min=1, help="Calls that one question may lead to.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="The answer as one JSON object.")] = False,
    web: Annotated[
        bool, typer.Option("--web", help="Talk in the browser instead, by a page that this machine alone serves.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show counts and speed after each reply.")] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Keep neither the conversation nor the lines that are typed.")
    ] = False,
    *,
    sampling: Annotated[dict[str, Any], Flags(SamplingParams, skip=(*NOT_FOR_CHAT, "adapter"))],
    loading: LoadFlags,
    engine: EngineFlags,
) -> None:
    """Talk to a model: a conversation on a terminal, or one answer for scripts.

    Text piped into stdin is the prompt; with --prompt it follows the prompt after a blank line. Commands inside the
    conversation begin with a slash: /help lists them. Conversations are kept for --continue and qwenlet history;
    --no-history, or QWENLET_NO_HISTORY=1 in the environment, keeps nothing.
    """
    if web:
        given: dict[str, Any] = {
            "--prompt": prompt,
            "--system": system,
            "--attach": attach,
            "--continue": go_on,
            "--resume": resume,
            "--tools": tools,
        }
        given |= {"--load": load, "--json": as_json, "--stats": stats, **{f"--{name}": True for name in sampling}}
        return _browse(model or DEMO, given, loading, engine, history=not no_history)
    question = _question(prompt, attach or [])
    if question is None and not console.is_terminal(sys.stdout):
        raise RequestError("a conversation needs a terminal, and stdout is none", hint="ask one question with --prompt")
    if question is None and as_json:
        raise typer.BadParameter("one answer can be JSON, a conversation can't: add --prompt", param_hint="--json")
    if system is not None:
        console.check_text(system, "--system")
    names = adapter_names(loading)
    if names:  # the first one speaks; /set adapter NAME calls another
        sampling["adapter"] = names[0]
    if (load is not None) + go_on + (resume is not None) > 1:
        raise typer.BadParameter("give one of --continue, --resume and --load", param_hint="--continue")
    caller = None if tools is None else _caller(tools, max_calls, ask=not allow_calls)
    hidden = no_history or is_off()
    with ExitStack() as stack:
        store = None if hidden else _opened(stack, needed=go_on or resume is not None)
        if store is None and (go_on or resume is not None):
            raise RequestError("the history is off, so there is no conversation to go on with", hint=OFF_HINT)
        tree = _earlier(store, resume) if go_on or resume is not None else None if load is None else saved.read(load)
        earlier = None if tree is None else saved.state_of(tree)[0]
        # what this command line says outweighs what was kept
        params = replace(earlier.params if earlier else SamplingParams(), **sampling)
        model = model or (tree.conversation.model if tree else "") or DEMO

        from qwenlet.cli.session import Session

        llm = stack.enter_context(load_model(model, **loading, **engine))
        state, unanswered = State(llm.default_system, params), None
        if tree is not None:
            state, unanswered = saved.state_of(tree, llm.default_system)
        state = replace(state, params=params, system=state.system if system is None else system)
        # another day begins in another folder
        name = str(Path(model).resolve()) if Path(model).exists() else model
        keeper = None if store is None else Keeper(store, name, llm.default_system)
        session = Session(llm, Conversation(model, state), keeper=keeper, stats=stats)
        session.unanswered, session.caller = unanswered, caller
        if question is None:
            _converse(session, keep_lines=not hidden)
        else:
            _answer(session, question, as_json=as_json)


def _caller(file: Path, limit: int, *, ask: bool) -> Caller:
    if ask and not console.is_terminal(sys.stdin):
        raise RequestError(
            "the tools' calls are asked about, and stdin is no terminal", hint="--allow-calls runs them without asking"
        )
    from qwenlet.cli.calls import Caller, ask_on_terminal
    from qwenlet.tools.functions import functions_of_file

    return Caller(functions_of_file(file), limit, ask_on_terminal if ask else None)


def _browse(
    model: str, given: dict[str, Any], loading: dict[str, Any], engine: dict[str, Any], *, history: bool
) -> None:
    without = [name.replace("_", "-") for name, value in given.items() if value]
    if without:
        raise typer.BadParameter(f"the page has its own {', '.join(without)}: leave it out", param_hint="--web")
    from qwenlet.cli import web

    web.talk(model, loading, engine, history=history)


def _opened(stack: ExitStack, *, needed: bool) -> Store | None:
    """The store; where it can't be used but is not needed the words are shown, and the chat goes on without."""
    try:
        return stack.enter_context(Store.open())
    except StoreError as problem:
        if needed:
            raise
        console.note(f"this conversation is not kept: {problem.message}")
        console.note(f"  {problem.hint or OFF_HINT}")
        return None


def _earlier(store: Store | None, resume: str | None) -> Tree:
    """The stored conversation to go on with: the one that is named, or the one that changed last."""
    assert store is not None
    if resume is not None:
        return store.tree(store.find(resume).id)
    if not (last := store.conversations(limit=1)):
        raise RequestError("there is no conversation to go on with yet", hint="leave --continue out to begin one")
    return store.tree(last[0].id)


def _question(prompt: str | None, attached: Sequence[Path]) -> str | None:
    """The one question to answer, from the flags and stdin together; None for a conversation."""
    piped = console.piped_text()
    parts = [] if prompt is None else [console.check_text(prompt, "--prompt")]
    if attached:
        parts.append(attach_files("", attached))
    if piped is not None and (piped.strip() or not parts):
        parts.append(piped)
    if not parts:
        return None
    question = "\n\n".join(parts)
    if not question.strip():
        raise RequestError("the prompt is empty", hint='give it with --prompt "..." or pipe it into stdin')
    return question


def _answer(session: Session, question: str, *, as_json: bool) -> None:
    reply = session.ask(question, quiet=as_json)
    session.keep()
    if as_json:
        print(json.dumps(_record(session, reply), ensure_ascii=False))
    if reply.finish_reason == "cancelled":
        raise typer.Exit(console.INTERRUPTED)


def _record(session: Session, reply: Reply) -> dict[str, Any]:
    """What --json prints of an answer."""
    from qwenlet.cli.reply import timings

    last = reply.last
    record: dict[str, Any] = {
        "conversation": session.conversation.state.talk,
        "model": session.conversation.model,
        "reply": reply.text,
        "finish_reason": reply.finish_reason,
    }
    if session.caller is not None:
        record["steps"] = session.conversation.exchanges[-1].steps if session.conversation.exchanges else ()
    if last is not None:
        counts = ("seed", "prompt_tokens", "completion_tokens", "dropped_turns")
        record |= {name: getattr(last, name) for name in counts} | {"timings": timings(last.timings)}
    return record


def _converse(session: Session, *, keep_lines: bool) -> None:
    from qwenlet.cli import repl

    llm, conversation = session.llm, session.conversation
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
    if session.unanswered is not None:
        console.note("The last question has no reply yet; /retry asks it again.")
    console.note("/help lists the commands; Ctrl-C stops a reply; Ctrl-D leaves.")
    repl.run(session, keep_history=keep_lines)
