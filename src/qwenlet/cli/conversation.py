"""A conversation as the terminal holds it: exchanges, system prompt, sampling; undo.

No model, no terminal and no file in here. A state is immutable, so undo is a list of earlier states.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qwenlet.config import SamplingParams
from qwenlet.errors import RequestError

# what a conversation can't use: it shows one reply, as text
NOT_FOR_CHAT = ("n", "logprobs")
CHAT_PARAMS = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name not in NOT_FOR_CHAT)


@dataclass(frozen=True)
class Exchange:
    """A question and its reply. A `finish_reason` of "length" or "cancelled" (not "stop") marks a reply cut short.

    Attributes:
        user: empty for what was said before any question.
        assistant: empty where the last thing said was no reply.
        steps: what stands between the two, as `StoredMessage.as_told` says it: calls of tools and their results.
        question_id, leaf_id: the question and the last message as the store knows them; None: not stored.
    """

    user: str
    assistant: str
    finish_reason: str = "stop"
    steps: tuple[Mapping[str, Any], ...] = ()
    question_id: str | None = field(default=None, compare=False)
    leaf_id: str | None = field(default=None, compare=False)

    def told(self) -> list[dict[str, Any]]:
        """What the model is told of it."""
        question = [{"role": "user", "content": self.user}] if self.user else []
        reply = [{"role": "assistant", "content": self.assistant}] if self.assistant else []
        return [*question, *map(dict, self.steps), *reply]


@dataclass(frozen=True)
class State:
    """`system` is empty where there is no system prompt; `talk` is the stored conversation, None before the first."""

    system: str
    params: SamplingParams
    exchanges: tuple[Exchange, ...] = ()
    talk: str | None = field(default=None, compare=False)

    def messages(self, question: str) -> list[dict[str, Any]]:
        """What the model is given when `question` is asked now."""
        told = [message for exchange in self.exchanges for message in exchange.told()]
        if self.system and all(message["role"] != "system" for message in told):
            told.insert(0, {"role": "system", "content": self.system})
        return [*told, {"role": "user", "content": question}]


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


def params_of(values: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters by name, as a file or the store has them. Raises RequestError for an unknown or bad one."""
    unknown = [name for name in values if name not in CHAT_PARAMS]
    if unknown:
        raise RequestError(f"params has {unknown[0]!r}, known are {', '.join(CHAT_PARAMS)}")
    try:
        return SamplingParams(**{name: _checked(name, value) for name, value in values.items()})
    except RequestError as problem:
        raise RequestError(f"params: {problem.message}") from None


def chosen(params: SamplingParams) -> dict[str, Any]:
    """The parameters that were set, by name."""
    defaults = SamplingParams()
    return {name: value for name, value in dataclasses.asdict(params).items() if value != getattr(defaults, name)}


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
