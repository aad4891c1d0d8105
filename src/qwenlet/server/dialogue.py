"""Messages and tools become a prompt, a grammar and a reader of the reply: what a chat means is known here alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from msgspec import UNSET, Meta, Struct

from qwenlet import chat, tools
from qwenlet.errors import RequestError
from qwenlet.llm import LLM
from qwenlet.server.errors import ApiError, refused
from qwenlet.server.fields import Anything, ignored, only, unsupported
from qwenlet.tools import Toolbox, ToolMessage


class Part(Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message: only text is understood."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Annotated[Anything, unsupported("the model reads text alone")] = UNSET
    input_audio: Annotated[Anything, unsupported("the model reads text alone")] = UNSET
    file: Annotated[Anything, unsupported("the model reads text alone")] = UNSET


class SentFunction(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a call of an earlier reply called."""

    name: str | None = None
    arguments: str = ""
    parsed_arguments: Annotated[Anything, ignored("`arguments` says it")] = UNSET


class SentCall(Struct, kw_only=True, forbid_unknown_fields=True):
    """A call of an earlier reply."""

    id: str = ""
    type: Annotated[str | None, only("function", "there are no other tools")] = None
    function: SentFunction | None = None
    index: Annotated[Anything, ignored("calls stand in their order")] = UNSET


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    """A message as clients send it, and send back."""

    role: str
    content: str | list[Part] | None = None
    name: Annotated[str | None, ignored("Qwen's format has no names")] = None
    refusal: str | None = None
    tool_calls: list[SentCall] | None = None
    tool_call_id: str | None = None
    function_call: SentFunction | None = None
    annotations: Annotated[Anything, ignored("they are not part of the text")] = UNSET
    parsed: Annotated[Anything, ignored("`content` says it")] = UNSET
    reasoning_content: Annotated[str | None, Meta(description="Repeated to the model with the calls it led to.")] = None
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
    thought: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __add__(self, other: Delta) -> Delta:
        return Delta(self.text + other.text, self.thought + other.thought, self.calls + other.calls)

    @classmethod
    def of(cls, events: Iterable[tools.Event]) -> Delta:
        text, thought = "", ""
        calls: list[CallDelta] = []
        for event in events:
            match event:
                case tools.Text():
                    text += event.text
                case tools.Thought():
                    thought += event.text
                case tools.CallBegun():
                    calls.append(CallDelta(event.index, "", event.id, event.name))
                case tools.Arguments():
                    calls.append(CallDelta(event.index, event.text))
        return cls(text, thought, tuple(calls))


class ReplyReader(Protocol):
    """Turns one reply's text into deltas, holding back what may still become something else."""

    def push(self, text: str) -> Delta: ...

    def finish(self, *, cut: bool = False) -> Delta:
        """What was held back, at the end; `cut`: the reply ended for want of tokens."""
        ...

    @property
    def called(self) -> bool:
        """Whether the reply holds a tool call."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing more of the reply is wanted."""
        ...


class PlainReader:
    """A reply that is text."""

    called = done = False

    def push(self, text: str) -> Delta:
        return Delta(text)

    def finish(self, *, cut: bool = False) -> Delta:
        return Delta()


class ReactReader:
    """A reply that may think and call tools."""

    def __init__(self, toolbox: Toolbox, thinking: bool) -> None:
        self._parser = tools.ReplyParser(toolbox, thinking=thinking)

    def push(self, text: str) -> Delta:
        return Delta.of(self._parser.push(text))

    def finish(self, *, cut: bool = False) -> Delta:
        return Delta.of(self._parser.finish(cut=cut))

    @property
    def called(self) -> bool:
        return bool(self._parser.calls)

    @property
    def done(self) -> bool:
        return self._parser.done


_NO_TOOLS = Toolbox()


@dataclass(frozen=True)
class Dialogue:
    """What the engine is asked.

    Attributes:
        ids: the prompt.
        toolbox: what the reply may or must call.
        thinking: the prompt ends within a thought.
    """

    ids: list[int]
    toolbox: Toolbox = _NO_TOOLS
    thinking: bool = False

    @property
    def plain(self) -> bool:
        return not self.toolbox and not self.thinking

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end the reply beside the client's own."""
        return () if self.plain else (tools.STOP_TEXT,)

    @property
    def must_call(self) -> bool:
        return self.toolbox.choice.mode == "required"

    def reader(self) -> ReplyReader:
        """For one choice."""
        return PlainReader() if self.plain else ReactReader(self.toolbox, self.thinking)

    def held_to(
        self, answer: Format | None, param: str, ignored: list[str], strict: str = "tools[].function.strict"
    ) -> dict[str, Any]:
        """The grammar of the reply, as SamplingParams names it: calls as the tools ask, the answer as the client does.

        Args:
            answer: the client's format.
            param: its field; put among `ignored` where every reply is a call.
            strict: the tools' field that asks for arguments as the schema says; put there where the reply is free.
        """
        if self.must_call:
            if answer is not None:
                ignored.append(param)
            return {"lark": tools.forced_reply(self.toolbox, thinking=self.thinking)}
        if answer is None:
            if any(tool.strict for tool in self.toolbox.offered):
                ignored.append(strict)
            return {}
        if not self.toolbox:
            return {"json_object": True} if answer.schema is None else {"json_schema": answer.schema}
        schema = {"type": "object"} if answer.schema is None else answer.schema
        return {"lark": tools.forced_reply(self.toolbox, thinking=self.thinking, answer=schema)}


@dataclass(frozen=True)
class Format:
    """What a client holds an answer to. Attributes: schema: JSON schema; None: any object."""

    schema: Mapping[str, Any] | None = None


def format_of(kind: str, schema: Mapping[str, Any] | None, param: str, place: str = "") -> Format | None:
    """From OpenAI's text, json_object and json_schema; None for text. Raises ApiError 400 that names the field.

    Args:
        param: the format's field; `place`: where in it the schema's object is.
    """
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        words = f"{param}.type is {kind!r:.80}, expected text, json_object or json_schema"
        raise ApiError(400, words, param=f"{param}.type")
    if kind == "json_schema" and schema is None:
        raise ApiError(400, f"{param} has no schema", param=f"{param}{place}.schema")
    return Format(schema)


def converse(
    llm: LLM,
    messages: Sequence[ChatMessage],
    toolbox: Toolbox | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
) -> Dialogue:
    """The prompt of a conversation; the checkpoint's own system message leads where the client gives none.

    Raises:
        ApiError: a role, a part or a field that can't be served, by its place.
        RequestError: messages in an order that has no meaning.
    """
    if not messages:
        raise ApiError(400, "messages is empty, expected one or more", param="messages")
    told = [_told(message, f"messages[{place}]") for place, message in enumerate(messages)]
    return asked(llm, told, toolbox, add_generation_prompt=add_generation_prompt, continue_final=continue_final)


def asked(
    llm: LLM,
    conversation: Sequence[ToolMessage],
    toolbox: Toolbox | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    instructions: str | None = None,
) -> Dialogue:
    """`converse` for messages in the package's own form; `instructions` are a system message before all others.

    Raises RequestError for an order that has no meaning.
    """
    toolbox, told = toolbox or _NO_TOOLS, list(conversation)
    if instructions is not None:
        told.insert(0, ToolMessage("system", instructions))
    if all(message.role != "system" for message in told) and llm.default_system:
        told.insert(0, ToolMessage("system", llm.default_system))
    plain = tools.react_messages(told, toolbox)
    ids = chat.render(llm.tokenizer, plain, add_generation_prompt, continue_final=continue_final)
    thinking = tools.continues_thought(plain)
    return Dialogue(ids, toolbox, thinking)


def _told(message: ChatMessage, place: str) -> ToolMessage:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    if role not in chat.ROLES:
        known = ", ".join([*chat.ROLES, "developer", "function"])
        raise ApiError(400, f"{place}.role is {message.role!r:.80}; known are {known}", param=f"{place}.role")
    called = message.function_call
    fields: dict[str, Any] = {"tool_calls": [_call(call) for call in message.tool_calls or ()]}
    fields |= {"function_call": None if called is None else _function(called)}
    fields |= {"tool_call_id": message.tool_call_id, "reasoning_content": message.reasoning_content}
    try:
        return ToolMessage.of({"role": role, "content": _text(message, place)} | fields)
    except RequestError as problem:
        raise ApiError(400, f"{place}: {problem.message}", param=place) from None


def _call(call: SentCall) -> dict[str, Any]:
    return {"id": call.id} | ({} if call.function is None else {"function": _function(call.function)})


def _function(function: SentFunction) -> dict[str, Any]:
    return {"name": function.name, "arguments": function.arguments}


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
