"""The commands of the chat: a table of names, usages and functions that act on a Session.

Adding one means writing a function and one line in the table; /help, completion and the nearest-name hint follow.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenlet.cli import console, saved
from qwenlet.cli.conversation import CHAT_PARAMS, parse_param
from qwenlet.cli.reply import stats_line
from qwenlet.cli.session import Session
from qwenlet.config import DEFAULT_NEW_TOKENS
from qwenlet.errors import RequestError
from qwenlet.store import title_of

MARKS = {"length": "[cut: no room for more, see max_new_tokens in /show]", "cancelled": "[stopped]"}


@dataclass(frozen=True)
class Command:
    run: Callable[[Session, str], None]
    argument: str
    help: str


def is_command(line: str) -> bool:
    """A line that begins with one slash; two slashes stand for a text that begins with one."""
    return line.startswith("/") and not line.startswith("//")


def execute(session: Session, line: str) -> None:
    """Runs one command. Raises QwenletError for an unknown name, a bad argument, or what the model raises."""
    name, _, argument = line[1:].strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.5)
        raise RequestError(
            f"there is no command /{name}", hint=f"did you mean /{near[0]}?" if near else "/help lists the commands"
        )
    argument = argument.strip()
    if argument and not command.argument:
        raise RequestError(f"/{name} takes no argument, but {argument!r} was given")
    command.run(session, argument)


def _help(session: Session, argument: str) -> None:
    usages = {f"/{name} {command.argument}".strip(): command.help for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    for usage, text in usages.items():
        console.message(f"  {usage:{width}}  {text}")
    console.message(
        "Ctrl-C stops a reply and keeps what there is of it; at the prompt it clears the line. Ctrl-D leaves.\n"
        "A text that begins with a slash is sent by doubling it: //like this."
    )


def _exit(session: Session, argument: str) -> None:
    session.finished = True


def _clear(session: Session, argument: str) -> None:
    conversation = session.conversation
    conversation.change("/clear", replace(conversation.state, exchanges=(), talk=None))
    session.unanswered = None
    console.note("a new conversation; /undo brings the old one back")


def _system(session: Session, argument: str) -> None:
    conversation = session.conversation
    if argument:
        text = "" if argument in ('""', "''") else argument
        conversation.change("/system", replace(conversation.state, system=text))
    console.message(f"system prompt: {conversation.state.system or '(none)'}")


def _history(session: Session, argument: str) -> None:
    if not session.conversation.exchanges:
        console.note("nothing has been said yet")
    for number, exchange in enumerate(session.conversation.exchanges, 1):
        console.message(f"{number} you> ", style="bold", end="")
        console.message(exchange.user)
        for step in exchange.steps:
            console.note(step_line(step))
        console.message(exchange.assistant)
        if exchange.finish_reason in MARKS:
            console.note(MARKS[exchange.finish_reason])


def _undo(session: Session, argument: str) -> None:
    what = session.conversation.undo()
    console.note(f"undone: {what}; {session.conversation.length} in the conversation")


def _regen(session: Session, argument: str) -> None:
    session.regenerate(_seed_value(argument) if argument else None)
    if session.last is not None:
        console.note(f"seed {session.last.seed} for this reply")


def _retry(session: Session, argument: str) -> None:
    session.retry(_seed_value(argument) if argument else None)


def _edit(session: Session, argument: str) -> None:
    asked = [exchange.user for exchange in session.conversation.exchanges]
    asked += [] if session.unanswered is None else [session.unanswered]
    if not asked:
        raise RequestError("there is no question to edit yet")
    number = _number(argument, len(asked), "question", "/history numbers them") if argument else len(asked)
    if session.edit is None:
        raise RequestError("a question is edited on a terminal, and this is none")
    text = session.edit(asked[number - 1])
    if not text.strip():
        console.note("nothing was asked")
        return
    session.revise(number, text)


def _branches(session: Session, argument: str) -> None:
    if session.keeper is None:
        raise RequestError("this conversation is not kept, so it has no branches", hint="/undo goes back")
    session.keep()
    state = session.conversation.state
    branches = session.keeper.branches(state)
    here = state.exchanges[-1].leaf_id if state.exchanges else None
    if argument:
        number = _number(argument, len(branches), "branch", "/branches lists them")
        new = session.keeper.branch(state, branches[number - 1][-1].id)
        session.conversation.change(f"going to branch {number}", new)
        session.unanswered = None
        console.note(f"{session.conversation.length} in the conversation; /history shows it, /undo goes back")
        return
    for number, branch in enumerate(branches, 1):
        question = next((one.content for one in reversed(branch) if one.role == "user"), "")
        mark = "*" if branch[-1].id == here else " "
        console.message(f"{mark} {number}  {len(branch)} messages  {title_of(question)}")
        if branch[-1].role != "user":
            console.note(f"      {title_of(branch[-1].content)}")
    if not branches:
        console.note("nothing has been said yet")


def _title(session: Session, argument: str) -> None:
    if session.keeper is None:
        raise RequestError("this conversation is not kept, so it has no title")
    if argument:
        session.conversation.state = session.keeper.rename(session.conversation.state, argument)
    talk = session.conversation.state.talk
    stored = None if talk is None else session.keeper.store.conversation(talk)
    console.message("nothing is stored yet" if stored is None else f"{stored.short_id}  {stored.title}")


def _number(text: str, count: int, what: str, hint: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= count:
        raise RequestError(f"there is no {what} {text!r:.40}; there are {count}", hint=hint)
    return int(text)


def step_line(step: Mapping[str, Any]) -> str:
    """What stands between a question and its reply, in one line: a call, a result, a thought."""
    calls = [call["function"] for call in step.get("tool_calls") or ()]
    if calls:
        return "; ".join(f"called {call['name']}({call.get('arguments', '')})" for call in calls)
    words = " ".join(step["content"].split())
    return f"{step['role']}: {words[:200]}{'…' if len(words) > 200 else ''}"


def _seed(session: Session, argument: str) -> None:
    if argument:
        session.conversation.set_params(seed=None if argument == "random" else _seed_value(argument))
    seed = session.conversation.params.seed
    console.message("seed: drawn for each reply" if seed is None else f"seed: {seed} for every reply")


def _seed_value(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise RequestError(f"the seed is {text!r}, expected a whole number of at least 0, or for /seed the word random")
    return int(text)


def _set(session: Session, argument: str) -> None:
    name, _, text = argument.partition(" ")
    if not name or not text.strip():
        raise RequestError("/set needs a name and a value", hint="/show lists the names; the value default resets one")
    name = name.replace("-", "_")
    session.conversation.set_params(**{name: parse_param(name, text.strip())})
    console.message(_setting(session, name))


def _setting(session: Session, name: str) -> str:
    own = getattr(session.conversation.params, name)
    value = getattr(session.conversation.params.resolve(session.llm.defaults), name)
    if name == "seed" and value is None:
        return "seed = drawn for each reply"
    if name == "max_new_tokens" and value is None:
        return f"max_new_tokens = {DEFAULT_NEW_TOKENS}"
    return f"{name} = {_shown(value)}" + ("  (the checkpoint's own)" if own is None and value != () else "")


def _shown(value: Any) -> str:
    return " ".join(repr(item) for item in value) or "none" if isinstance(value, tuple) else str(value)


def _show(session: Session, argument: str) -> None:
    console.message(session.model_line)
    console.message(f"system prompt: {session.conversation.state.system or '(none)'}")
    for name in CHAT_PARAMS:
        console.message(_setting(session, name))
    if session.last is not None:
        console.message(f"seed of the last reply: {session.last.seed}")


def _save(session: Session, argument: str) -> None:
    path = _path(argument)
    saved.write(path, session.conversation.model, session.conversation.state)
    console.note(f"saved {path}; {session.conversation.length} in the conversation")


def _load(session: Session, argument: str) -> None:
    path = _path(argument)
    tree = saved.read(path)
    model = tree.conversation.model
    state, _ = saved.state_of(tree, session.llm.default_system)
    session.conversation.change(f"loading {path}", state)
    session.unanswered = None
    console.note(f"loaded {path}; {session.conversation.length} in the conversation; /undo brings the old one back")
    if model and model != session.conversation.model:
        console.note(f"it was held with {model}; {session.conversation.model} goes on with it")


def _path(argument: str) -> Path:
    try:
        words = shlex.split(argument)
    except ValueError as problem:
        raise RequestError(f"can't read the file name {argument!r}: {problem}") from None
    if len(words) != 1:
        raise RequestError(f"expected one file name, got {argument!r}", hint="put quotes around a name with spaces")
    return Path(words[0]).expanduser()


def _stats(session: Session, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise RequestError(f"/stats takes on or off, not {argument!r}")
    if argument:
        session.stats = argument == "on"
        console.note(f"counts and speed after each reply: {argument}")
    elif session.last is not None:
        console.note(stats_line(session.last))
    else:
        console.note("no reply yet")


def _multiline(session: Session, argument: str) -> None:
    session.multiline = not session.multiline
    console.note("Enter starts a new line, Alt-Enter (or Esc, Enter) sends" if session.multiline else "Enter sends")


COMMANDS = {
    "help": Command(_help, "", "this list"),
    "exit": Command(_exit, "", "leave"),
    "clear": Command(_clear, "", "start a new conversation"),
    "system": Command(_system, "[TEXT]", 'show or set the system prompt; "" removes it'),
    "history": Command(_history, "", "show the conversation"),
    "undo": Command(_undo, "", "take back the last exchange, or the last change by a command"),
    "retry": Command(_retry, "[SEED]", "ask the last question again, also one that brought no reply"),
    "regen": Command(_regen, "[SEED]", "draw the last reply again, with this seed or a fresh one"),
    "edit": Command(_edit, "[NUMBER]", "change the last question, or an earlier one, and ask it; the old branch stays"),
    "branches": Command(_branches, "[NUMBER]", "list what was said on other branches, or go to one"),
    "title": Command(_title, "[TEXT]", "show or change what the conversation is called in the history"),
    "seed": Command(_seed, "[N|random]", "show or fix the seed of every reply"),
    "set": Command(_set, "NAME VALUE", "change a setting; the value default resets it"),
    "show": Command(_show, "", "show model, system prompt and the settings in force"),
    "save": Command(_save, "FILE", "write the conversation to a file"),
    "load": Command(_load, "FILE", "go on with a saved conversation"),
    "stats": Command(_stats, "[on|off]", "show counts and speed of the last reply, or after each"),
    "multiline": Command(_multiline, "", "switch between sending with Enter and with Alt-Enter"),
}
