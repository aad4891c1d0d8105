"""A conversation as the terminal keeps it: exchanges, system prompt, sampling; undo; and its file.

No model and no terminal in here. A state is immutable, so undo is a list of earlier states.

The file is JSON: {"version": 1, "model", "system", "messages": [{"role", "content"}, ...], "params": {...}}, written
whole or not at all. An assistant's message that was cut short carries "finish_reason".
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenlet.config import SamplingParams
from qwenlet.errors import QwenletError, RequestError

VERSION = 1

# what a conversation can't use: it shows one reply, as text
NOT_FOR_CHAT = ("n", "logprobs")
CHAT_PARAMS = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name not in NOT_FOR_CHAT)


@dataclass(frozen=True)
class Exchange:
    """A question and its reply. A `finish_reason` of "length" or "cancelled" (not "stop") marks a reply cut short."""

    user: str
    assistant: str
    finish_reason: str = "stop"


@dataclass(frozen=True)
class State:
    """`system` is empty where there is no system prompt."""

    system: str
    params: SamplingParams
    exchanges: tuple[Exchange, ...] = ()

    def messages(self, question: str) -> list[dict[str, str]]:
        """What the model is given when `question` is asked now."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            messages.append({"role": "user", "content": exchange.user})
            messages.append({"role": "assistant", "content": exchange.assistant})
        return [*messages, {"role": "user", "content": question}]


class Conversation:
    """The present state and the earlier ones.

    Args:
        model: the name that was loaded, kept in the file.
    """

    def __init__(self, model: str, state: State) -> None:
        self.model = model
        self.state = state
        self._earlier: list[tuple[str, State]] = []

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        return self.state.exchanges

    @property
    def params(self) -> SamplingParams:
        return self.state.params

    @property
    def length(self) -> str:
        count = len(self.exchanges)
        return "1 exchange" if count == 1 else f"{count} exchanges"

    def change(self, what: str, state: State) -> None:
        """Goes over to `state`; `what` says what an undo takes back."""
        self._earlier.append((what, self.state))
        self.state = state

    def add(self, exchange: Exchange) -> None:
        self.change("the last exchange", replace(self.state, exchanges=(*self.exchanges, exchange)))

    def set_params(self, **values: Any) -> None:
        """Raises RequestError and changes nothing if a value is refused."""
        params = replace(self.params, **values)
        self.change("the change of " + ", ".join(values), replace(self.state, params=params))

    def undo(self) -> str:
        """Takes the last change back and says what it was; after a load also exchanges from before it."""
        if self._earlier:
            what, self.state = self._earlier.pop()
            return what
        if self.exchanges:
            self.state = replace(self.state, exchanges=self.exchanges[:-1])
            return "the last exchange"
        raise RequestError("there is nothing to undo")

    # -------------------------------------------------------------------------------------------------- the file

    def save(self, path: Path) -> None:
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
        content = json.dumps(self._to_dict(), ensure_ascii=False, indent=2) + "\n"
        _write_atomically(path, content.encode("utf-8"))

    def _to_dict(self) -> dict[str, Any]:
        messages: list[dict[str, str]] = []
        for exchange in self.exchanges:
            messages.append({"role": "user", "content": exchange.user})
            reply = {"role": "assistant", "content": exchange.assistant}
            if exchange.finish_reason != "stop":
                reply["finish_reason"] = exchange.finish_reason
            messages.append(reply)
        defaults = SamplingParams()
        params = {
            name: value for name, value in dataclasses.asdict(self.params).items() if value != getattr(defaults, name)
        }
        return {
            "version": VERSION,
            "model": self.model,
            "system": self.state.system,
            "messages": messages,
            "params": params,
        }

    def load(self, path: Path) -> str:
        """Replaces the state by the file's, if all of it is good; returns the name of the model it was held with."""
        model, state = read(path)
        self.change(f"loading {path}", state)
        return model


def _write_atomically(path: Path, content: bytes) -> None:
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as problem:
        raise RequestError(f"can't write into {path.parent}: {problem.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as problem:
        Path(name).unlink(missing_ok=True)
        raise RequestError(f"can't write {path}: {problem.strerror}") from None


def read(path: Path) -> tuple[str, State]:
    """The model's name and the state in a saved conversation. Raises RequestError for anything that isn't one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(raw, ensure_ascii=False).encode("utf-8")  # "\\ud800" is JSON, but no text
    except OSError as problem:
        raise RequestError(f"can't read {path}: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise RequestError(f"{path} is not a saved conversation: {problem}") from None
    if not isinstance(raw, dict):
        raise RequestError(f"{path} holds a JSON {type(raw).__name__}, expected an object")
    if raw.get("version") != VERSION:
        raise RequestError(
            f"{path}: version is {raw.get('version')!r}, expected {VERSION}",
            hint="only files written by /save can be loaded",
        )
    model, system, messages, params = (raw.get(name) for name in ("model", "system", "messages", "params"))
    for name, value, kind in (("model", model, str), ("system", system, str), ("params", params, dict)):
        if not isinstance(value, kind):
            raise RequestError(f"{path}: {name} is {value!r}, expected a JSON {'object' if kind is dict else 'string'}")
    if not isinstance(messages, list) or len(messages) % 2:
        raise RequestError(f"{path}: messages is not a list of questions and replies in turn")
    texts = [_message(path, i, message) for i, message in enumerate(messages)]
    exchanges = tuple(
        Exchange(question, reply, reason)
        for (question, _), (reply, reason) in zip(texts[::2], texts[1::2], strict=True)
    )
    return str(model), State(str(system), _params(path, params or {}), exchanges)


def _message(path: Path, index: int, message: Any) -> tuple[str, str]:
    """Content and finish reason of the message at `index`."""
    role = "assistant" if index % 2 else "user"
    known = {"role", "content"} | ({"finish_reason"} if role == "assistant" else set())
    if not isinstance(message, dict) or message.get("role") != role or set(message) - known:
        raise RequestError(
            f"{path}: message {index} is {message!r:.100}, expected an object with role {role!r} and content"
        )
    content, reason = message.get("content"), message.get("finish_reason", "stop")
    if not isinstance(content, str) or reason not in ("stop", "length", "cancelled"):
        raise RequestError(f"{path}: message {index} has content {repr(content)[:60]} and finish_reason {reason!r}")
    return content, reason


def _params(path: Path, params: Mapping[str, Any]) -> SamplingParams:
    unknown = [name for name in params if name not in CHAT_PARAMS]
    if unknown:
        raise RequestError(f"{path}: params has {unknown[0]!r}, known are {', '.join(CHAT_PARAMS)}")
    try:
        return SamplingParams(**{name: _checked(name, value) for name, value in params.items()})
    except RequestError as problem:
        raise RequestError(f"{path}: params: {problem.message}") from None


# ------------------------------------------------------------------------------------------------- values by name


def parse_param(name: str, text: str) -> Any:
    """The value of a sampling parameter as typed: JSON (0.7, true, ["\\n"]), a bare word, or "default".

    Raises RequestError for an unknown name, naming the nearest; whether the value is good, SamplingParams says.
    """
    if name not in CHAT_PARAMS:
        near = difflib.get_close_matches(name, CHAT_PARAMS, 1)
        raise RequestError(
            f"there is no setting {name!r}; known are {', '.join(CHAT_PARAMS)}",
            hint=f"did you mean {near[0]}?" if near else None,
        )
    default = getattr(SamplingParams(), name)
    try:
        value = default if text == "default" else json.loads(text)
    except json.JSONDecodeError:
        value = text
    return _checked(name, value)


def _checked(name: str, value: Any) -> Any:
    """Catches the types that SamplingParams takes for granted."""
    default = getattr(SamplingParams(), name)
    if value is None and default is not None:
        return default
    if isinstance(default, bool) and not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}, expected true or false")
    if name == "stop_token_ids" and isinstance(value, int):
        return (value,)
    if name in ("stop", "stop_token_ids") and not isinstance(value, (str, list, tuple, type(None))):
        raise RequestError(f"{name} is {value!r}, expected a list")
    return value
