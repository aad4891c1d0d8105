"""Messages and tools become a prompt, a grammar and a reader of the reply: what a chat means is known here alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from msgspec import UNSET, Struct

from qwenlet import chat
from qwenlet.api import LLM
from qwenlet.config import GrammarSpec
from qwenlet.server.errors import ApiError, refused
from qwenlet.server.fields import Anything, ignored, unsupported


class Part(Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message: only text is understood."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Annotated[Anything, unsupported("the model reads text alone")] = UNSET
    input_audio: Annotated[Anything, unsupported("the model reads text alone")] = UNSET
    file: Annotated[Anything, unsupported("the model reads text alone")] = UNSET


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    """A message as clients send it, and send back."""

    role: str
    content: str | list[Part] | None = None
    name: Annotated[str | None, ignored("Qwen's format has no names")] = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Annotated[str | None, ignored("results are read in their order")] = None
    function_call: dict[str, Any] | None = None
    annotations: Annotated[Anything, ignored("they are not part of the text")] = UNSET
    reasoning_content: Annotated[Anything, ignored("earlier thoughts are not repeated to the model")] = UNSET
    audio: Annotated[Anything, unsupported("the model reads text alone")] = UNSET


@dataclass(frozen=True)
class CallDelta:
    """What was added to one tool call; id and name come with the first."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Delta:
    """What was added to a reply."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class ReplyReader(Protocol):
    """Turns one reply's text into deltas, holding back what may still become something else."""

    def push(self, text: str) -> Delta: ...

    def finish(self) -> Delta:
        """What was held back, at the end."""
        ...

    @property
    def called(self) -> bool:
        """Whether the reply holds a tool call."""
        ...


class PlainReader:
    """A reply that is text."""

    called = False

    def push(self, text: str) -> Delta:
        return Delta(text)

    def finish(self) -> Delta:
        return Delta()


@dataclass(frozen=True)
class Dialogue:
    """What the engine is asked.

    Attributes:
        ids: the prompt.
        grammar: what the reply is held to because a call is forced; None leaves that to the request.
        stop: texts that end the reply beside the client's own.
        reader: makes a reader for each choice.
    """

    ids: list[int]
    grammar: GrammarSpec | None = None
    stop: tuple[str, ...] = ()
    reader: Callable[[], ReplyReader] = PlainReader


def converse(
    llm: LLM,
    messages: Sequence[ChatMessage],
    tools: Sequence[dict[str, Any]] | None = None,
    tool_choice: Any = None,
    *,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
) -> Dialogue:
    """The prompt of a conversation; the checkpoint's own system message leads where the client gives none.

    Raises:
        ApiError: a role, a part or a field that can't be served, by its place.
        RequestError: messages in an order that has no meaning.
    """
    if tools and tool_choice != "none":
        raise refused("tools", "are not supported by this version")
    if not tools and tool_choice not in (None, "none", "auto"):
        raise ApiError(400, f"tool_choice is {tool_choice!r:.80}, but there are no tools", param="tool_choice")
    if not messages:
        raise ApiError(400, "messages is empty, expected one or more", param="messages")
    plain = [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]
    if all(message.role != "system" for message in plain) and llm.default_system:
        plain.insert(0, chat.Message("system", llm.default_system))
    return Dialogue(chat.render(llm.tokenizer, plain, add_generation_prompt, continue_final=continue_final))


def _plain(message: ChatMessage, place: str) -> chat.Message:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    if role not in chat.ROLES:
        known = ", ".join([*chat.ROLES, "developer", "function"])
        raise ApiError(400, f"{place}.role is {message.role!r:.80}; known are {known}", param=f"{place}.role")
    if message.audio is not UNSET and message.audio is not None:
        raise refused(f"{place}.audio", "is not supported: the model reads text alone")
    if message.tool_calls or message.function_call:
        raise refused(f"{place}.tool_calls", "are not supported by this version")
    return chat.Message(role, _text(message, place))


def _text(message: ChatMessage, place: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role != "assistant":
            raise ApiError(400, f"{place}.content is missing, expected text", param=f"{place}.content")
        return message.refusal or ""
    texts = []
    for number, part in enumerate(message.content):
        here = f"{place}.content[{number}]"
        words = part.text if part.type == "text" else part.refusal if part.type == "refusal" else None
        if part.type not in ("text", "refusal"):
            raise refused(f"{here}.type", f"is {part.type!r:.80}, and the model reads text alone")
        if words is None:
            raise ApiError(400, f"{here} has no {part.type}", param=here)
        texts.append(words)
    return "".join(texts)
