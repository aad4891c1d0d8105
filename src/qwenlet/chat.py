"""Messages to token ids and back: the one place where the dialogue format (ChatML) is known. No torch in here.

    render, render_text     messages -> ids, or the same as readable text
    label                   ... and which of the ids training shall learn to write
    make_context            the published rule for query and history, truncation included
    fit                     our own rule: drops old turns until prompt and reply fit the context
    parse_reply, stop_ids   ids of a reply -> text, and where a reply ends

Control tokens are inserted as ids, and everything people wrote is encoded as plain text: no text can forge a turn.
The words of tool use (ReAct prompt, calls) belong to another module; here a tool's result only finds its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, get_args

from qwenlet.errors import ContextLengthError, RequestError, TokenizerError
from qwenlet.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "tool"]
ChatFormat = Literal["chatml", "raw"]
ROLES: tuple[Role, ...] = get_args(Role)

_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"
# how Qwen-1 was taught to see a tool's result, and to go on after it
_OBSERVATION, _THOUGHT = "\nObservation: ", "\nThought:"


# `render_text` for programs that run Jinja templates: tokenizer_config.json, GGUF, transformers.
CHAT_TEMPLATE = """{%- set seen = namespace(role='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'tool' -%}
    {%- if seen.role not in ['assistant', 'tool'] -%}
      {{- raise_exception('a tool message belongs after the assistant message that called the tool') -}}
    {%- endif -%}
    {{- '\nObservation: ' + message['content'] -}}
  {%- elif message['role'] == 'assistant' and seen.role == 'tool' -%}
    {{- ('\n' if message['content'].startswith('Thought:') else '\nThought:') + message['content'] -}}
  {%- elif message['role'] in ['system', 'user', 'assistant'] -%}
    {{- ('<|im_end|>\n' if seen.role else '') + '<|im_start|>' + message['role'] + '\n' + message['content'] -}}
  {%- else -%}
    {{- raise_exception('a message has the role ' + message['role'] + '; known are system, user, assistant, tool') -}}
  {%- endif -%}
  {%- set seen.role = message['role'] -%}
{%- endfor -%}
{%- if not add_generation_prompt -%}
  {{- '<|im_end|>' -}}
{%- elif seen.role == 'tool' -%}
  {{- '\nThought:' -}}
{%- else -%}
  {{- '<|im_end|>\n<|im_start|>assistant\n' -}}
{%- endif -%}"""


@dataclass(frozen=True)
class Message:
    """One message of a conversation. Raises RequestError for an unknown role or a content that is not text."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RequestError(f"a message has the role {self.role!r}; known are {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise RequestError(f"a {self.role} message has the content {self.content!r}, expected text")

    @classmethod
    def of(cls, value: Message | Mapping[str, Any]) -> Message:
        """`value` itself, or a message from {"role": ..., "content": ...}."""
        if isinstance(value, Message):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"a message is {value!r}, expected a Message or a dict with role and content")
        if missing := {"role", "content"} - value.keys():
            raise RequestError(f"a message has no {' and no '.join(sorted(missing))}: {dict(value)!r}")
        if unknown := value.keys() - {"role", "content"}:
            raise RequestError(f"a message has the field {min(unknown)!r}, which is not understood here")
        return cls(value["role"], value["content"])


Messages = Sequence[Message | Mapping[str, Any]]


class HasRole(Protocol):
    @property
    def role(self) -> Role: ...


Spoken = TypeVar("Spoken", bound=HasRole)


@dataclass(frozen=True)
class Fitted:
    """A conversation that fits.

    Attributes:
        messages: what was kept.
        ids: their prompt, ready for a reply.
        dropped_turns: user messages, with their answers, that were left out.
    """

    messages: tuple[Message, ...]
    ids: list[int]
    dropped_turns: int


def render(
    tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True, *, continue_final: bool = False
) -> list[int]:
    """Token ids of a conversation; nothing is added to it, no system message either.

    A tool's result continues the assistant turn before it ("Observation: ..."), and so does the assistant message that
    follows ("Thought: ..."); a reply asked for right after a result goes on in that open turn.

    Args:
        add_generation_prompt: end where the assistant's reply begins.
        continue_final: leave the last message open instead, so that the reply goes on in it.

    Raises:
        RequestError: no messages, or one that has no place; the last one is no assistant's but shall go on.
        TokenizerError: the vocabulary has no ChatML control tokens, or text that can't be encoded.
    """
    chatml = _ChatML(tokenizer)
    checked = _checked(messages)
    turns = _turns(checked, add_generation_prompt and not continue_final)
    if continue_final:
        if checked[-1].role != "assistant":
            raise RequestError(f"the last message is a {checked[-1].role} message; only an assistant's can go on")
        turns[-1] = replace(turns[-1], open=True)
    return chatml.join([chatml.encode(turn) for turn in turns])


def render_text(messages: Messages, add_generation_prompt: bool = True) -> str:
    """What `render` encodes, as text to read: in it control tokens and people's words can't be told apart."""
    return "\n".join(turn.text for turn in _turns(_checked(messages), add_generation_prompt))


def label(
    tokenizer: Tokenizer, messages: Messages, learned: Sequence[bool] | None = None, *, published: bool = False
) -> tuple[list[int], list[bool]]:
    """What `render` gives for a whole conversation, and for each id whether training shall learn to write it.

    That is what the assistant writes: its text and the token that ends its turn; of a tool's result the word
    "Observation:", where a call ends, and nothing that the tool said.

    Args:
        learned: for each message whether it is learned, if it is the assistant's; None: all.
        published: as the published fine-tuning code labels: of every role the tokens that begin and end a turn and the
            line break behind it too.

    Raises:
        RequestError, TokenizerError: as `render`; `learned` is of another length.
    """
    chatml = _ChatML(tokenizer)
    checked = _checked(messages)
    wanted = [True] * len(checked) if learned is None else list(learned)
    if len(wanted) != len(checked):
        raise RequestError(f"{len(wanted)} flags of what is learned were given for {len(checked)} messages")
    turns: list[tuple[Role, list[tuple[str, bool]]]] = []
    for (message, opens, lead, content), want in zip(_placed(checked), wanted, strict=True):
        if opens:
            turns.append((message.role, []))
        segments = turns[-1][1]
        if message.role == "tool":
            called = segments[-1][1]
            segments += [(_OBSERVATION.rstrip(), called), (_OBSERVATION[-1] + content, False)]
        else:
            segments += [(lead, False), (content, want and message.role == "assistant")]
    ids: list[int] = []
    marks: list[bool] = []
    for index, (role, segments) in enumerate(turns):
        written, inside = chatml.encode_segments(segments)
        head, end = chatml.head(role), segments[-1][1]
        ids += [*head, *written, chatml.end]
        marks += [published] + [False] * (len(head) - 1) + inside + [end or published]
        if published or index < len(turns) - 1:
            ids += chatml.newline
            marks += [published] * len(chatml.newline)
    return ids, marks


def make_context(
    tokenizer: Tokenizer,
    query: str,
    history: Iterable[tuple[str, str]] | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: ChatFormat = "chatml",
) -> tuple[str, list[int]]:
    """The published prompt: (raw text, ids).

    The newest turns of `history` are kept while they and the system turn have fewer than `max_window_size` tokens.
    As published, neither the query nor the reply count, and "raw" is the query alone, its control tokens allowed;
    `fit` is the rule that counts all.
    """
    if _checked_format(chat_format) == "raw":
        return query, tokenizer.encode(query)
    chatml = _ChatML(tokenizer)
    first = _parts(chatml, _Turn("system", system))
    size = len(first[1])
    kept = [_parts(chatml, _Turn("assistant", "", open=True)), _parts(chatml, _Turn("user", query))]  # newest first
    for question, answer in reversed(list(history or ())):
        turns = [_parts(chatml, _Turn("assistant", answer)), _parts(chatml, _Turn("user", question))]
        size += sum(len(chatml.newline) + len(ids) for _, ids in turns)
        if size >= max_window_size:
            break
        kept += turns
    kept.append(first)
    kept.reverse()
    return "\n".join(text for text, _ in kept), chatml.join([ids for _, ids in kept])


def fit(tokenizer: Tokenizer, messages: Messages, context_length: int, reserve: int) -> Fitted:
    """Drops the oldest turns until the prompt and a reply of `reserve` tokens fit `context_length`.

    A turn is a user message with everything up to the next one. System messages at the start and the last turn are
    always kept. Each message is encoded once.

    Raises:
        ContextLengthError: what must be kept does not fit.
        RequestError, TokenizerError: as `render`.
    """
    if reserve < 0:
        raise RequestError(f"reserve is {reserve}, expected the reply's tokens, 0 or more")
    chatml = _ChatML(tokenizer)
    system, turns_of = exchanges(_checked(messages))
    fixed = [chatml.encode(turn) for turn in _turns(system, add_generation_prompt=False)]
    rendered = [
        [chatml.encode(turn) for turn in _turns(exchange, add_generation_prompt=exchange is turns_of[-1])]
        for exchange in turns_of
    ]
    sizes = [sum(len(chatml.newline) + len(ids) for ids in turns) for turns in [fixed, *rendered]]
    prompt_tokens = sum(sizes) - len(chatml.newline)
    dropped = 0
    while prompt_tokens + reserve > context_length:
        if dropped == len(turns_of) - 1:
            raise ContextLengthError(prompt_tokens, context_length, reserve)
        dropped += 1
        prompt_tokens -= sizes[dropped]
    kept = [message for exchange in turns_of[dropped:] for message in exchange]
    ids = chatml.join(fixed + [ids for turns in rendered[dropped:] for ids in turns])
    return Fitted((*system, *kept), ids, dropped)


def exchanges(messages: Sequence[Spoken]) -> tuple[list[Spoken], list[list[Spoken]]]:
    """System messages at the start, and the rest cut before each user message; the last exchange may be empty."""
    first = next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))
    cut: list[list[Spoken]] = []
    for message in messages[first:]:
        if message.role == "user" or not cut:
            cut.append([])
        cut[-1].append(message)
    return list(messages[:first]), cut or [[]]


def parse_reply(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of a reply, up to the first id that ends one; white space and the last token are kept."""
    stops = stop_ids(tokenizer)
    end = next((index for index, id in enumerate(ids) if id in stops), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


def stop_ids(tokenizer: Tokenizer, chat_format: ChatFormat = "chatml") -> tuple[int, ...]:
    """Ids that end a reply, as far as the vocabulary has them, and the one its file names as its end."""
    ids = [tokenizer.eod_id, tokenizer.eos_id]
    if _checked_format(chat_format) == "chatml":
        ids = [tokenizer.im_end_id, tokenizer.im_start_id, *ids]
    return tuple(dict.fromkeys(id for id in ids if id is not None))


def history_to_messages(
    query: str, history: Iterable[tuple[str, str]] | None = None, system: str | None = None
) -> list[Message]:
    """Messages of a query after (question, answer) pairs; `system=""` is an empty system turn, None is no such turn."""
    messages = [] if system is None else [Message("system", system)]
    for question, answer in history or ():
        messages += [Message("user", question), Message("assistant", answer)]
    return [*messages, Message("user", query)]


@dataclass(frozen=True)
class _Turn:
    """What stands between two control tokens; an open turn is one that the model goes on writing."""

    role: Role
    content: str
    open: bool = False

    @property
    def text(self) -> str:
        return f"{_IM_START}{self.role}\n{self.content}{'' if self.open else _IM_END}"


class _ChatML:
    """Encodes turns with the control ids of one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        start, end = tokenizer.im_start_id, tokenizer.im_end_id
        if start is None or end is None:
            missing = _IM_START if start is None else _IM_END
            raise TokenizerError(
                f"the vocabulary of {tokenizer.source} has no {missing}, which chats need",
                hint="the model was not made for this dialogue format; generate from plain text instead",
            )
        self._tokenizer, self._start, self.end = tokenizer, start, end
        self.newline = self._plain("\n")

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, allowed_special=set())

    def encode(self, turn: _Turn) -> list[int]:
        # role, line break and content are encoded apart, as published: merges never cross from one to the next
        ids = [*self.head(turn.role), *self._plain(turn.content)]
        return ids if turn.open else [*ids, self.end]

    def head(self, role: Role) -> list[int]:
        return [self._start, *self._plain(role), *self.newline]

    def encode_segments(self, segments: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Ids of the segments' whole text, as `encode` makes them, each marked as the segment in which it begins."""
        ids = self._plain("".join(text for text, _ in segments))
        kinds = {mark for text, mark in segments if text}
        if len(kinds) < 2:
            return ids, [mark for mark in kinds for _ in ids]
        marks, at = [], 0
        ends: list[tuple[int, bool]] = []
        for text, mark in segments:
            at += len(self._tokenizer.normalize(text).encode())
            ends.append((at, mark))
        at = place = 0
        for id in ids:
            while place < len(ends) - 1 and ends[place][0] <= at:
                place += 1
            marks.append(ends[place][1])
            at += len(self._tokenizer.token_bytes(id))
        return ids, marks

    def join(self, turns: Sequence[list[int]]) -> list[int]:
        ids: list[int] = []
        for index, turn in enumerate(turns):
            ids += [*self.newline, *turn] if index else turn
        return ids


def _parts(chatml: _ChatML, turn: _Turn) -> tuple[str, list[int]]:
    return turn.text, chatml.encode(turn)


def _checked(messages: Messages) -> list[Message]:
    if isinstance(messages, (str, Mapping, Message)):
        raise RequestError(f"messages is {messages!r}, expected a list of messages")
    checked = [Message.of(message) for message in messages]
    if not checked:
        raise RequestError("the conversation has no messages")
    return checked


def _turns(messages: Sequence[Message], add_generation_prompt: bool) -> list[_Turn]:
    """Turns of a conversation: tool results, and what the assistant made of them, continue its turn."""
    turns: list[tuple[Role, list[str]]] = []
    for message, opens, lead, content in _placed(messages):
        if opens:
            turns.append((message.role, []))
        turns[-1][1].append(lead + content)
    whole = [_Turn(role, "".join(parts)) for role, parts in turns]
    if not add_generation_prompt:
        return whole
    if messages and messages[-1].role == "tool":
        return [*whole[:-1], _Turn("assistant", whole[-1].content + _THOUGHT, open=True)]
    return [*whole, _Turn("assistant", "", open=True)]


def _placed(messages: Sequence[Message]) -> Iterator[tuple[Message, bool, str, str]]:
    """Each message, whether it begins a turn, the words that lead to it where it continues one, and its own."""
    previous: Role | None = None
    for message in messages:
        if message.role == "tool":
            if previous not in ("assistant", "tool"):
                raise RequestError(
                    f"a tool message follows {'nothing' if previous is None else f'a {previous} message'}; "
                    "it belongs after the assistant message that called the tool"
                )
            yield message, False, _OBSERVATION, message.content
        elif message.role == "assistant" and previous == "tool":
            yield message, False, _THOUGHT, message.content.removeprefix(_THOUGHT.lstrip())
        else:
            yield message, True, "", message.content
        previous = message.role


def _checked_format(chat_format: Any) -> ChatFormat:
    if chat_format not in get_args(ChatFormat):
        raise RequestError(f"chat_format is {chat_format!r}; known are {', '.join(get_args(ChatFormat))}")
    checked: ChatFormat = chat_format
    return checked
