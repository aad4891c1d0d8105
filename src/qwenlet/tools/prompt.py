"""A conversation with tools, calls and results -> the messages of the published ReAct format.

The tools are described in the last user message but one, or the only one; a past call is a thought, an action and its
input, with the result as the observation that follows; a past answer is a final answer. Several calls of one message
stand one after another, each with its own result, as the model would have made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenlet.chat import Message, Role
from qwenlet.errors import RequestError
from qwenlet.tools.declared import Call, Tool, Toolbox

# The words that the model was trained on: they are data, and no place for style.
_DESCRIPTION = (
    "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? {description} "
    "Parameters: {parameters}"
)
_INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

{descriptions}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {question}"""
_ANSWER = "Thought: I now know the final answer.\nFinal Answer: "


@dataclass(frozen=True)
class ToolMessage:
    """One message of a conversation in which tools may be called.

    Attributes:
        calls: what an assistant message called.
        thought: what the assistant thought, where its client kept that apart from the content.
        call_id: the call whose result a tool message is; None: the oldest without one.
    """

    role: Role
    content: str = ""
    calls: tuple[Call, ...] = ()
    thought: str = ""
    call_id: str | None = None

    def __post_init__(self) -> None:
        Message(self.role, self.content)  # its checks
        if self.calls and self.role != "assistant":
            raise RequestError(f"a {self.role} message has tool calls; only the assistant calls tools")
        if self.call_id is not None and self.role != "tool":
            raise RequestError(f"a {self.role} message has a tool_call_id; only a tool message has one")

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> ToolMessage:
        """From OpenAI's form, its content already text or null: `tool_calls`, legacy `function_call`, roles `tool` and
        legacy `function`, `developer` as system."""
        role = value.get("role")
        content = value.get("content")
        made = value.get("tool_calls") or ()
        if not isinstance(made, list | tuple):
            raise RequestError(f"tool_calls is {made!r:.60}, expected a list of calls")
        calls = tuple(_call(call) for call in made)
        if (legacy := value.get("function_call")) is not None:
            calls += (_call({"id": "", "function": legacy}),)
        if content is None and not calls:
            raise RequestError(f"a {role} message has no content")
        roles: dict[Any, Any] = {"developer": "system", "function": "tool"}
        known: Any = role if not isinstance(role, str) else roles.get(role, role)
        thought = value.get("reasoning_content") or value.get("reasoning") or ""
        return cls(
            known,
            "" if content is None else content,
            calls,
            thought if isinstance(thought, str) else "",
            value.get("tool_call_id"),
        )


def react_messages(conversation: Sequence[ToolMessage], toolbox: Toolbox) -> list[Message]:
    """Messages for `chat.render`; a conversation without tools, calls and results comes back as it is.

    Raises:
        RequestError: a result without its call, a call without its result, or tools and no user message.
    """
    messages = _written(conversation, toolbox)
    if toolbox:
        if (place := _question(messages)) is None:
            raise RequestError("tools are given, but the conversation has no user message to describe them in")
        messages[place] = _described(messages[place], toolbox.offered)
    return messages


def react_replies(conversation: Sequence[ToolMessage], toolbox: Toolbox) -> list[tuple[list[Message], int]]:
    """A whole conversation as its replies were asked for: what they are learned behind.

    While a conversation goes on the tools move from question to question, so that no one text stands behind all of its
    replies. It is told in parts, each with the tools where its new replies had them.

    Returns:
        Messages of each part, and the index from which on its replies are new; the last part is the whole conversation.
    Raises:
        RequestError: as `react_messages`; it does not end with a reply.
    """
    messages = _written(conversation, toolbox)
    if not toolbox:
        return [(messages, 0)]
    replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not replies or replies[-1] != len(messages) - 1:
        raise RequestError("the conversation does not end with a reply of the assistant")
    parts: list[tuple[list[Message], int]] = []
    first = 0
    for reply, following in zip(replies, [*replies[1:], len(messages)], strict=True):
        place = _question(messages[:reply])
        last = following == len(messages)
        if not last and place in (None, _question(messages[:following])):
            continue  # the next one stands behind the same text, or nothing was asked yet
        if place is None:
            raise RequestError("tools are given, but no user message stands before a reply to describe them in")
        part = messages if last else messages[: _end_of_results(messages, reply + 1)]
        described = _described(messages[place], toolbox.offered)
        parts.append(([*part[:place], described, *part[place + 1 :]], first))
        first = following
    return parts


def _written(conversation: Sequence[ToolMessage], toolbox: Toolbox) -> list[Message]:
    """The messages, the tools not yet described."""
    if not toolbox and not any(message.calls or message.role == "tool" for message in conversation):
        return [Message(message.role, message.content) for message in conversation]
    messages: list[Message] = []
    index = 0
    while index < len(conversation):
        message = conversation[index]
        index += 1
        content = message.content.lstrip("\n").rstrip()
        if message.calls:
            end = _end_of_results(conversation, index)
            results, index = conversation[index:end], end
            messages += _called(message, results)
        elif message.role == "tool":
            raise RequestError(
                "a tool message follows no assistant message with tool calls; it belongs after the one that called it"
            )
        elif message.role == "assistant" and (toolbox or (messages and messages[-1].role == "tool")):
            messages.append(Message("assistant", _ANSWER + content))
        else:
            messages.append(Message(message.role, content))
    return messages


def continues_thought(messages: Sequence[Message]) -> bool:
    """Whether `chat.render` ends the prompt of these messages within a thought, after a result."""
    return bool(messages) and messages[-1].role == "tool"


def _question(messages: Sequence[Message]) -> int | None:
    """The message that the tools stand in: the last user message but one where the last is still to be answered, else
    the last; None without any."""
    asked = [index for index, message in enumerate(messages) if message.role == "user"]
    open_question = bool(messages) and messages[-1].role == "user"
    return None if not asked else asked[-2] if open_question and len(asked) > 1 else asked[-1]


def _described(question: Message, tools: Sequence[Tool]) -> Message:
    """A user message behind what describes the tools."""
    described = [
        _DESCRIPTION.format(
            name=tool.name,
            human=tool.human_name or tool.name,
            description=tool.description,
            parameters=tool.schema_text,
        )
        for tool in tools
    ]
    text = _INSTRUCTION.format(
        descriptions="\n\n".join(described),
        names=", ".join(tool.name for tool in tools),
        question=question.content,
    )
    return Message("user", text)


def _end_of_results(conversation: Sequence[ToolMessage | Message], start: int) -> int:
    end = start
    while end < len(conversation) and conversation[end].role == "tool":
        end += 1
    return end


def _called(message: ToolMessage, results: Sequence[ToolMessage]) -> list[Message]:
    """An assistant message's calls, each followed by its result."""
    content = message.content.lstrip("\n").rstrip()
    thought = "\n".join(part for part in (message.thought.strip(), content) if part)
    left = list(results)
    messages: list[Message] = []
    for number, call in enumerate(message.calls):
        found = next((r for r in left if r.call_id == call.id or not r.call_id or not call.id), None)
        if found is None:
            raise RequestError(
                f"the tool call {call.id!r} of {call.name} has no result; each call needs a tool message after it"
            )
        left.remove(found)
        before = thought if number == 0 else ""
        before = before if before.startswith("Thought:") else f"Thought: {before}"
        text = f"{before}\nAction: {call.name}\nAction Input: {call.arguments}"
        messages += [Message("assistant", text.rstrip()), Message("tool", found.content.lstrip("\n").rstrip())]
    if left:
        raise RequestError(f"a tool message has the tool_call_id {left[0].call_id!r}, which no call before it has")
    return messages


def _call(value: Any) -> Call:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"a tool call is {value!r:.200}, expected an id and a function with a name and arguments")
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str) or not isinstance(value.get("id", ""), str):
        raise RequestError(f"the call of {function['name']} has an id or arguments that are no text")
    return Call(value.get("id", ""), function["name"], arguments)
