"""The terminal's state as a stored conversation, and back; and the files of /save and /load.

A file is qwenlet's own export, written whole or not at all; what is read may also be another program's.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwenlet.cli import console
from qwenlet.cli.conversation import Exchange, State, chosen, params_of
from qwenlet.errors import QwenletError, RequestError
from qwenlet.store import Conversation, StoredMessage, Tree, interchange, title_of

_CUT = ("length", "cancelled")


def state_of(tree: Tree, default_system: str = "") -> tuple[State, str | None]:
    """The state that goes on with a stored conversation, and the last question if it has no reply.

    Raises RequestError for sampling parameters that are none.
    """
    settings, path = tree.conversation.settings, tree.path
    system, sampling = settings.get("system", default_system), settings.get("sampling", {})
    if not isinstance(system, str) or not isinstance(sampling, Mapping):
        raise RequestError(
            f"the settings are {dict(settings)!r:.200}, expected a text as system, an object as sampling"
        )
    params = params_of(sampling)
    messages = [message for message in path if message.role != "system"]
    if "system" in settings:
        path = messages  # as `Tree.told` has it: what was chosen stands for all of them
    elif path and path[0].role == "system" and len(messages) == len(path) - 1:
        system, path = path[0].content, messages
    exchanges = [_exchange(group) for group in _groups(path)]
    unanswered = None
    if exchanges and exchanges[-1].told() == [{"role": "user", "content": exchanges[-1].user}]:
        unanswered = exchanges.pop().user
    talk = tree.conversation.id or None
    return State(system, params, tuple(exchanges), talk), unanswered


def settings_of(state: State, default_system: str | None = None) -> dict[str, object]:
    """What the store keeps beside the messages; the model's own system prompt stays the model's."""
    system = {} if state.system == default_system else {"system": state.system}
    sampling = chosen(state.params)
    return {**system, **({"sampling": sampling} if sampling else {})}


def tree_of(model: str, state: State) -> Tree:
    """The conversation as one branch."""
    now = time.time()
    messages: list[StoredMessage] = []
    for exchange in state.exchanges:
        for told, extra in rows(exchange):
            parent = messages[-1].id if messages else None
            messages.append(StoredMessage(str(len(messages)), "", parent, told["role"], told["content"], now, extra))
    current = messages[-1].id if messages else None
    title = title_of(state.exchanges[0].user) if state.exchanges else ""
    return Tree(Conversation("", title, model, current, now, now, settings_of(state)), tuple(messages))


def rows(exchange: Exchange) -> list[tuple[dict[str, str], dict[str, object]]]:
    """(role and content, what else is kept) of each message of an exchange."""
    parts: list[tuple[dict[str, str], dict[str, object]]] = []
    for told in exchange.told():
        extra = {name: value for name, value in told.items() if name not in ("role", "content")}
        parts.append(({"role": told["role"], "content": told["content"]}, extra))
    if exchange.assistant and exchange.finish_reason in _CUT:
        parts[-1][1]["finish_reason"] = exchange.finish_reason
    return parts


def _groups(path: Sequence[StoredMessage]) -> list[list[StoredMessage]]:
    """A branch, cut before each question."""
    groups: list[list[StoredMessage]] = []
    for message in path:
        if message.role == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return groups


def _exchange(group: Sequence[StoredMessage]) -> Exchange:
    first, last = group[0], group[-1]
    asked = first.role == "user"
    answered = last.role == "assistant" and not last.extra.get("tool_calls")
    steps = group[1 if asked else 0 : -1 if answered else None]
    reason = last.extra.get("finish_reason")
    return Exchange(
        first.content if asked else "",
        last.content if answered else "",
        reason if answered and reason in _CUT else "stop",
        tuple(message.as_told() for message in steps),
        first.id if asked else None,
        last.id,
    )


# ------------------------------------------------------------------------------------------------------- files


def read(path: Path) -> Tree:
    """The one conversation in a file. Raises RequestError for anything else, or settings that are none."""
    trees = interchange.read(console.file_text(path), str(path)).trees
    if len(trees) > 1:
        raise RequestError(
            f"{path} holds {len(trees)} conversations, expected one",
            hint=f"qwenlet history import {path} keeps them all, and qwenlet chat --resume goes on with one",
        )
    try:
        state_of(trees[0])
    except RequestError as problem:
        raise RequestError(f"{path}: {problem.message}") from None
    return trees[0]


def write(path: Path, model: str, state: State) -> None:
    """Writes the conversation whole or not at all, readable by its owner alone.

    Raises RequestError for a file that exists and is not a conversation: it may be someone's work.
    """
    path = path.resolve()
    if path.exists():
        try:
            read(path)
        except QwenletError:
            raise RequestError(
                f"{path} exists and is not a saved conversation, so it is left alone", hint="choose another name"
            ) from None
    write_atomically(path, interchange.to_json([tree_of(model, state)]))


def write_atomically(path: Path, text: str) -> None:
    """A text file, whole or not at all. Raises RequestError where it can't be written."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as problem:
        raise RequestError(f"can't write into {path.parent}: {problem.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as problem:
        Path(name).unlink(missing_ok=True)
        raise RequestError(f"can't write {path}: {problem.strerror}") from None
