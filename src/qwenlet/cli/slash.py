"""The commands of the chat: a table of names, usages and functions that act on a Session.

Adding one means writing a function and one line in the table; /help, completion and the nearest-name hint follow.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenlet.cli import console
from qwenlet.cli.conversation import CHAT_PARAMS, parse_param
from qwenlet.cli.reply import stats_line
from qwenlet.cli.session import Session
from qwenlet.config import DEFAULT_NEW_TOKENS
from qwenlet.errors import RequestError

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
    conversation.change("/clear", replace(conversation.state, exchanges=()))
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
    for exchange in session.conversation.exchanges:
        console.message("you> ", style="bold", end="")
        console.message(exchange.user)
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
    session.conversation.save(path)
    console.note(f"saved {path}; {session.conversation.length} in the conversation")


def _load(session: Session, argument: str) -> None:
    path = _path(argument)
    model = session.conversation.load(path)
    console.note(f"loaded {path}; {session.conversation.length} in the conversation; /undo brings the old one back")
    if model != session.conversation.model:
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
    "regen": Command(_regen, "[SEED]", "draw the last reply again, with this seed or a fresh one"),
    "seed": Command(_seed, "[N|random]", "show or fix the seed of every reply"),
    "set": Command(_set, "NAME VALUE", "change a setting; the value default resets it"),
    "show": Command(_show, "", "show model, system prompt and the settings in force"),
    "save": Command(_save, "FILE", "write the conversation to a file"),
    "load": Command(_load, "FILE", "go on with a saved conversation"),
    "stats": Command(_stats, "[on|off]", "show counts and speed of the last reply, or after each"),
    "multiline": Command(_multiline, "", "switch between sending with Enter and with Alt-Enter"),
}
