"""The prompt: line editing, history and completion by prompt_toolkit, around a Session."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from qwenlet.cli import console, slash
from qwenlet.cli.conversation import CHAT_PARAMS
from qwenlet.cli.session import Session


def run(session: Session, *, keep_history: bool = True) -> None:
    """Reads lines until /exit or Ctrl-D. Errors are shown and the conversation goes on."""
    history = open_history() if keep_history else InMemoryHistory()
    editor: PromptSession[str] = PromptSession(
        history=history, completer=SlashCompleter(), complete_while_typing=False, enable_suspend=True
    )
    while not session.finished:
        try:
            line = editor.prompt("you> ", multiline=session.multiline)
            if line.strip():
                handle(session, line)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def handle(session: Session, line: str) -> None:
    """One line: a command or a question. Whatever goes wrong, the conversation goes on."""
    try:
        console.check_text(line, "the line")
        if slash.is_command(line):
            slash.execute(session, line)
            return
        reply = session.ask(line.removeprefix("/") if line.startswith("//") else line)
    except Exception as problem:
        console.explain(problem)
        return
    if not reply.text:
        console.note("no reply, so the question is not kept")
    elif reply.finish_reason in slash.MARKS:
        console.note(slash.MARKS[reply.finish_reason])


class SlashCompleter(Completer):
    """Names of commands, of settings after /set, and of files after /save and /load."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not slash.is_command(text):
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
    path = Path(platformdirs.user_data_path("qwenlet")) / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError as problem:
        console.note(f"lines are not remembered after this conversation: {path}: {problem.strerror}")
        return InMemoryHistory()
    return _PrivateHistory(str(path))
