"""The prompt: line editing, history and completion by prompt_toolkit, around a Session."""

from __future__ import annotations

import os
from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.utils import is_dumb_terminal

from qwenlet.cli import attachments, console, slash
from qwenlet.cli.conversation import CHAT_PARAMS
from qwenlet.cli.session import Session
from qwenlet.store import data_dir


def run(session: Session, *, keep_history: bool = True) -> None:
    """Reads lines until /exit or Ctrl-D. Errors are shown and the conversation goes on."""
    history = open_history() if keep_history else InMemoryHistory()
    editor: PromptSession[str] = PromptSession(
        history=history,
        completer=SlashCompleter(),
        complete_while_typing=False,
        enable_suspend=True,
        enable_open_in_editor=True,
        tempfile_suffix=".txt",
    )
    session.edit = lambda text: _edited(text, multiline=session.multiline)
    while not session.finished:
        try:
            line = editor.prompt("you> ", multiline=session.multiline)
            if line.strip():
                handle(session, line)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _edited(text: str, *, multiline: bool) -> str:
    """The text as the user changed it; empty where that was given up."""
    several = multiline or "\n" in text
    if is_dumb_terminal():  # where the editor shows only what is typed
        console.message(text)
    if several:
        console.note("Alt-Enter (or Esc, Enter) sends, Ctrl-C gives up")
    try:
        # a session of its own, or its history and its default would be those of the questions
        return PromptSession[str](history=InMemoryHistory()).prompt("edit> ", default=text, multiline=several)
    except (KeyboardInterrupt, EOFError):
        return ""


def handle(session: Session, line: str) -> None:
    """One line: a command or a question. Whatever goes wrong, the conversation goes on."""
    try:
        console.check_text(line, "the line")
        if slash.is_command(line):
            before = session.last
            slash.execute(session, line)
            if session.last is before:
                return
        else:
            session.ask(attachments.expand(line.removeprefix("/") if line.startswith("//") else line))
    except Exception as problem:
        console.explain(problem)
        return
    finally:
        session.keep()
    if session.unanswered is not None:
        console.note("no reply, so the question is not part of the conversation; /retry asks it again")
    elif session.conversation.exchanges[-1].finish_reason in slash.MARKS:
        console.note(slash.MARKS[session.conversation.exchanges[-1].finish_reason])


class SlashCompleter(Completer):
    """Names of commands, of settings after /set, and of files after /save, /load and @."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not slash.is_command(text):
            if (start := attachments.begun(text)) is not None:
                yield from self._paths.get_completions(Document(start), complete_event)
            return
        command, space, argument = text.partition(" ")
        if not space:
            yield from _matching(command, (f"/{name}" for name in slash.COMMANDS))
        elif command in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif command == "/set":
            yield from _matching(argument, CHAT_PARAMS)
        elif command == "/stats":
            yield from _matching(argument, ("on", "off"))


def _matching(start: str, words: Iterable[str]) -> Iterable[Completion]:
    return (Completion(word, start_position=-len(start)) for word in words if word.startswith(start))


class _PrivateHistory(FileHistory):
    """A history file whose trouble (a full disk, a byte that is no text) never costs the conversation."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string.encode("utf-8", "replace").decode("utf-8"))
        except OSError as problem:
            console.note(f"the line could not be added to {os.fsdecode(self.filename)}: {problem.strerror}")


def open_history() -> History:
    """The history file in the user's data folder, readable by its owner alone; in memory where it can't be written."""
    path = data_dir() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError as problem:
        console.note(f"lines are not remembered after this conversation: {path}: {problem.strerror}")
        return InMemoryHistory()
    return _PrivateHistory(str(path))
