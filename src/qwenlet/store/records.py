"""What the store keeps, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# fields of a message that a model is told, beside role and content; named as OpenAI's clients name them
TOLD = ("tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Conversation:
    """Attributes: times are seconds since 1970; `current` is the leaf of the branch that is shown, None while empty.

    `settings` are JSON: "system" is the system prompt ("" for none, left out for the model's own), "sampling" the
    fields of SamplingParams that were chosen.
    """

    id: str
    title: str
    model: str
    current: str | None
    created: float
    updated: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def short_id(self) -> str:
        """The beginning of the id, for people; `Store.find` takes it."""
        return self.id.partition("_")[2][:8]


@dataclass(frozen=True)
class StoredMessage:
    """One message in the tree of its conversation.

    Attributes:
        parent: the message it follows; None: it is a first one.
        role: system, user, assistant or tool.
        extra: what else is kept with it, as JSON. "tool_calls", "tool_call_id" and "reasoning_content" mean what they
            mean to OpenAI's clients; "finish_reason" is there where a reply was cut short ("length", "cancelled").
    """

    id: str
    conversation: str
    parent: str | None
    role: str
    content: str
    created: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_told(self) -> dict[str, Any]:
        """The message as OpenAI's clients send it, which is what `ToolMessage.of` reads."""
        told = {name: self.extra[name] for name in TOLD if self.extra.get(name) is not None}
        return {"role": self.role, "content": self.content, **told}


@dataclass(frozen=True)
class Tree:
    """A whole conversation: parents stand before their children."""

    conversation: Conversation
    messages: tuple[StoredMessage, ...] = ()

    @property
    def path(self) -> list[StoredMessage]:
        """The current branch, from its first message to its leaf."""
        known = {message.id: message for message in self.messages}
        current = self.conversation.current
        path: list[StoredMessage] = []
        while current is not None:
            path.append(known[current])
            current = known[current].parent
        return path[::-1]

    def told(self, default_system: str = "") -> list[dict[str, Any]]:
        """What a model is told of the current branch, as OpenAI's clients send it.

        The system prompt that was chosen for the conversation stands for all system messages of the branch, which an
        import may have brought: it is the later word.

        Args:
            default_system: the system prompt where the conversation has none of its own; "" for none.
        """
        messages = [message.as_told() for message in self.path]
        system = self.conversation.settings.get("system")
        if system is not None:
            messages = [message for message in messages if message["role"] != "system"]
        elif all(message["role"] != "system" for message in messages):
            system = default_system
        return [{"role": "system", "content": system}, *messages] if system else messages


@dataclass(frozen=True)
class Found:
    """A place that a search found; `message` is None where the title was it.

    Attributes:
        excerpt: one line around the first word that was found.
    """

    conversation: Conversation
    message: StoredMessage | None
    excerpt: str


@dataclass(frozen=True)
class StoredResponse:
    """A response of /v1/responses: its object as sent, and the input items that led to it, without earlier ones."""

    id: str
    previous: str | None
    body: Mapping[str, Any]
    input: tuple[Mapping[str, Any], ...]
    created: float
