"""A reply in ReAct format, piece by piece -> text, thoughts and calls. Any cut into pieces gives the same.

Markers (Thought, Action, Action Input, Observation, Final Answer) count at the beginning of a line. What may still
become one is held back, everything else leaves at once. A small model's slips are forgiven: bold markers, a Chinese
colon, a quoted name, a missing "Action Input:", fences around the JSON. An action that names no tool stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import regex

from qwenlet.tools.declared import Call, Toolbox, new_call_id

# What ends a reply on the engine's side: the result is the caller's to give.
STOP_TEXT = "\nObservation:"


@dataclass(frozen=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Thought:
    """What the model thinks before it acts or answers."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call's name is known; its arguments follow. Calls are numbered from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments."""

    index: int
    text: str


Event = Text | Thought | CallBegun | Arguments
_State = Literal["text", "thought", "answer", "input", "json", "raw", "after"]

_BEFORE, _COLON = r"[ \t]{0,8}\*{0,2}", r"\*{0,2}[ \t]{0,2}[:：]"
_QUOTES = r"[ \t`\"'*\[\]<>().。]{0,8}"
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class Reply:
    """A whole reply.

    Attributes:
        text: what the user reads; empty where the reply only calls.
    """

    text: str
    thought: str
    calls: tuple[Call, ...]

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Reply:
        text, thought = "", ""
        begun: list[CallBegun] = []
        arguments: list[str] = []
        for event in events:
            match event:
                case Text():
                    text += event.text
                case Thought():
                    thought += event.text
                case CallBegun():
                    begun.append(event)
                    arguments.append("")
                case Arguments():
                    arguments[event.index] += event.text
        calls = tuple(Call(one.id, one.name, written) for one, written in zip(begun, arguments, strict=True))
        return cls(text, thought, calls)


def parse_reply(
    text: str, toolbox: Toolbox, *, thinking: bool = False, make_id: Callable[[], str] = new_call_id
) -> Reply:
    parser = ReplyParser(toolbox, thinking=thinking, make_id=make_id)
    return Reply.from_events([*parser.push(text), *parser.finish()])


class ReplyParser:
    """Reads one reply.

    Attributes:
        done: nothing more of the reply is wanted; what is pushed after is not read.
        calls: how many calls were begun.

    Args:
        thinking: the prompt ends within a thought, as `continues_thought` says.
    """

    def __init__(self, toolbox: Toolbox, *, thinking: bool = False, make_id: Callable[[], str] = new_call_id) -> None:
        names = sorted((tool.name for tool in toolbox.offered), key=len, reverse=True)
        self._names = {name.casefold(): name for name in names} | {name: name for name in names}
        named = rf"Action{_COLON}{_QUOTES}(?P<name>(?i:{'|'.join(map(regex.escape, names)) or '(?!)'})){_QUOTES}"
        # after the name comes its input, or an object without that word, or at once the result
        then = rf"(?:\s{{0,4}}{_BEFORE}Action[ _]?Input{_COLON}|\s{{0,4}}(?=\{{)|(?=\n{{1,4}}Observation))"
        sections = rf"(?P<section>Thought|Final Answer|Observation){_COLON}"
        self._marker = regex.compile(rf"{_BEFORE}(?:{sections}|{named}{then})")
        self._only_named = regex.compile(rf"{_BEFORE}{named}\s{{0,4}}")
        self._parallel = toolbox.parallel is True
        self._make_id = make_id
        self.done = False
        self.calls = 0
        self._events: list[Event] = []
        self._held = ""  # the beginning of a line that may become a marker
        self._line_start = True
        self._state: _State = "thought" if thinking else "text"
        self._fresh = thinking  # nothing was written since the marker
        self._skip = _BLANK  # what a section may not begin with
        self._blank = ""  # white space that leaves with what follows it
        self._wrote: set[str] = set()
        self._thoughts: list[str] = []
        self._lead = ""  # of an input whose kind is not yet known
        self._depth, self._quoted, self._escaped = 0, False, False
        self._filled = False  # the latest call has arguments

    def push(self, text: str) -> list[Event]:
        """What became certain with this text."""
        if self._state == "answer" and not self.done:  # runs to the end of the reply
            self._write(text)
            return self._take()
        self._held += text
        while self._held and not self.done:
            if self._line_start and self._state != "answer":
                match = self._marker.match(self._held, partial=True)
                if match is not None and match.partial:
                    break
                if match is not None and self._enter(match):
                    self._held = self._held[match.end() :]
                    self._line_start = False
                    continue
                self._line_start = False
            line, newline, self._held = self._held.partition("\n")
            self._write(line + newline)
            self._line_start = bool(newline)
        return self._take()

    def finish(self, *, cut: bool = False) -> list[Event]:
        """What was held back, at the end of the reply.

        Args:
            cut: the reply ended for want of tokens, so a call that had only its name is none.
        """
        if not self.done and self._held:
            held, self._held = self._held, ""
            match = self._only_named.match(held)
            rest = "" if match is None else held[match.end() :].lstrip(" \t*")
            if match is not None and not cut and "Action Input:".startswith(rest) and self._free_for_call():
                self._begin(match["name"])
            else:
                self._write(held)
        if self._lead:
            self._write_arguments(self._lead.strip())
            self._lead = ""
        if self._state in ("text", "answer") and self._blank and ("text" in self._wrote or not self.calls):
            self._emit("text", self._blank)
        if self.calls and not self._filled and not cut:
            self._write_arguments("{}")
        if not self.calls and "text" not in self._wrote and self._thoughts:
            self._emit("text", "".join(self._thoughts))  # it thought and said nothing: that was the answer
        self.done = True
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _free_for_call(self) -> bool:
        return self._parallel or not self.calls

    def _enter(self, match: regex.Match[str]) -> bool:
        """Takes a marker; False for one that is text where it stands."""
        section = match["section"]
        in_call = self._state in ("input", "json", "raw", "after")
        if section == "Observation":
            if self._state == "text":
                return False
            self._close()
            self.done = True
            return True
        if in_call:
            self._close()
            if not self._parallel:
                self.done = True
                return True
        if section is None:
            self._begin(match["name"])
        else:
            self._state = "thought" if section == "Thought" else "answer"
        self._fresh, self._blank = True, ""
        self._skip = _BLANK + ("*" if "*" in match[0] else "")
        return True

    def _begin(self, name: str) -> None:
        self._close()
        name = self._names.get(name) or self._names[name.casefold()]
        self._events.append(CallBegun(self.calls, self._make_id(), name))
        self.calls += 1
        self._state, self._filled, self._lead = "input", False, ""
        self._depth, self._quoted, self._escaped = 0, False, False

    def _close(self) -> None:
        """Ends the arguments of the latest call, if they are open."""
        if self._lead.strip():
            self._write_arguments(self._lead.strip())
        self._lead = self._blank = ""
        if self.calls and not self._filled:
            self._write_arguments("{}")

    def _write(self, text: str) -> None:
        if self._state == "input":
            self._lead += text
            text = self._lead.lstrip(self._skip + "`")
            fenced = "`" in self._lead[: len(self._lead) - len(text)]
            if fenced and "json".startswith(text[:4]):
                text = text[4:].lstrip(_BLANK)
            if not text:
                return
            self._state = "json" if text[0] == "{" else "raw"
            text, self._lead = (text if self._state == "json" else self._lead), ""
            self._fresh = True
        if self._state == "json":
            text = self._json(text)
            if self._state == "json" or not text:
                return
        channel = {"thought": "thought", "after": "thought", "raw": "arguments"}.get(self._state, "text")
        if self._fresh:
            text = text.lstrip(self._skip)
            if not text:
                return
            self._fresh = False
            if channel in self._wrote and channel != "arguments":
                text = "\n" + text
        body = text.rstrip(_BLANK)
        if body:
            self._emit(channel, self._blank + body)
            self._blank = ""
        self._blank += text[len(body) :]

    def _json(self, text: str) -> str:
        """Writes the object's text, and returns what stands behind its end."""
        for index, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._write_arguments(text[: index + 1])
                    self._state, self._fresh, self._skip = "after", True, _BLANK + "`)"
                    self.done = not self._parallel
                    return "" if self.done else text[index + 1 :]
        self._write_arguments(text)
        return ""

    def _write_arguments(self, text: str) -> None:
        if text:
            self._events.append(Arguments(self.calls - 1, text))
            self._filled = True

    def _emit(self, channel: str, text: str) -> None:
        if channel == "arguments":
            self._write_arguments(text)
            return
        self._wrote.add(channel)
        if channel == "thought":
            self._thoughts.append(text)
            self._events.append(Thought(text))
        else:
            self._events.append(Text(text))
