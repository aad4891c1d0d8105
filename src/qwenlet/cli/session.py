"""A conversation with a loaded model at a terminal: ask, show, keep. Line editing and commands are elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenlet.cli import console
from qwenlet.cli.calls import Caller, as_steps
from qwenlet.cli.conversation import Conversation, Exchange, State
from qwenlet.cli.keeper import Keeper
from qwenlet.cli.reply import Reply, show, stats_line
from qwenlet.config import SamplingParams
from qwenlet.errors import RequestError, StoreError
from qwenlet.tools import ReplyParser, Toolbox

if TYPE_CHECKING:
    from qwenlet.engine import Chunk
    from qwenlet.llm import LLM


class Session:
    """What the commands act on.

    Attributes:
        keeper: stores the conversation; None: it is not kept.
        stats: show counts and speed after each reply.
        multiline: Enter starts a new line instead of sending.
        last: the last chunk of the last reply.
        unanswered: the last question, if it brought no reply.
        finished: set by /exit.
        caller: runs tools; None: there are none.
        edit: lets the user change a text and returns it; None where nobody can.
    """

    def __init__(
        self, llm: LLM, conversation: Conversation, *, keeper: Keeper | None = None, stats: bool = False
    ) -> None:
        self.llm = llm
        self.conversation = conversation
        self.keeper = keeper
        self.stats = stats
        self.quiet = False
        self.multiline = False
        self.last: Chunk | None = None
        self.unanswered: str | None = None
        self._edited: int | None = None  # the place of the unanswered question, where it was an edit
        self.finished = False
        self.caller: Caller | None = None
        self.edit: Callable[[str], str] | None = None

    @property
    def model_line(self) -> str:
        """What is talking: name, precision, device, context."""
        llm = self.llm
        return f"{llm.name}: {llm.precision} on {llm.device}, context of {llm.context_length} tokens"

    def ask(self, question: str, *, quiet: bool = False) -> Reply:
        """Shows the reply to `question`, unless `quiet`; one that brings no text is not part of the conversation.

        Raises QwenletError as the model does; the conversation is unchanged then.
        """
        self.quiet = quiet
        return self._ask(self.conversation.state, question, "the last exchange")

    def regenerate(self, seed: int | None = None) -> Reply:
        """Replaces the last reply by another one, drawn with `seed`, or with a fresh seed even if one is fixed.

        The old reply stays if the new one brings no text. Raises RequestError when there is no reply yet.
        """
        state = self.conversation.state
        if not state.exchanges:
            raise RequestError("there is no reply to draw again")
        *earlier, last = state.exchanges
        params = replace(state.params, seed=seed)
        if params.resolve(self.llm.defaults).temperature == 0:
            console.note("temperature is 0, so the reply will be the same: /set temperature 0.7 lets it vary")
        before, unanswered = replace(state, exchanges=tuple(earlier)), self.unanswered
        try:
            reply = self._ask(before, last.user, "the new reply", params, last.question_id)
            if not reply.text:
                console.note("no reply, so the old one stays")
            return reply
        finally:
            self.unanswered = unanswered  # the question has the old reply or the new one

    def retry(self, seed: int | None = None) -> Reply:
        """Asks the last question again: the one without a reply, or else as `regenerate`."""
        if self.unanswered is None:
            return self.regenerate(seed)
        state = self.conversation.state
        if self._edited is not None:
            return self.revise(self._edited, self.unanswered, seed)
        return self._ask(state, self.unanswered, "the last exchange", replace(state.params, seed=seed))

    def revise(self, number: int, question: str, seed: int | None = None) -> Reply:
        """Asks another question in the place of the `number`-th; what followed it stays stored, on its own branch."""
        state = self.conversation.state
        before = replace(state, exchanges=state.exchanges[: number - 1])
        params = state.params if seed is None else replace(state.params, seed=seed)
        try:
            return self._ask(before, question, f"the edit of question {number}", params)
        finally:
            self._edited = number if self.unanswered is not None else None

    def keep(self) -> None:
        """Brings the store to where the conversation is. Where that fails the words are shown, and it goes on."""
        if self.keeper is not None:
            try:
                self.conversation.state = self.keeper.follow(self.conversation.state)
            except StoreError as problem:
                _not_kept(problem)

    def _ask(
        self,
        before: State,
        question: str,
        what: str,
        params: SamplingParams | None = None,
        question_id: str | None = None,
    ) -> Reply:
        """Asks after `before`; a reply makes that the conversation, which an undo of `what` takes back."""
        self.unanswered, self._edited = question, None
        if self.keeper is not None and question_id is None:
            try:
                before, question_id = self.keeper.ask(before, question)
                if self.conversation.state.talk is None:  # so that an undo stays in this conversation
                    self.conversation.state = replace(self.conversation.state, talk=before.talk)
            except StoreError as problem:
                _not_kept(problem)
        steps: list[dict[str, Any]] = []
        reply = Reply("", "error", None)
        try:
            reply = self._reply(before, question, params or before.params, steps)
        finally:
            if reply.text or steps:  # calls that ran are part of what happened, whatever came then
                self.unanswered = None
                exchange = Exchange(question, reply.text, reply.finish_reason, tuple(steps), question_id)
                self.conversation.change(what, replace(before, exchanges=(*before.exchanges, exchange)))
        return reply

    def _reply(self, state: State, question: str, params: SamplingParams, steps: list[dict[str, Any]]) -> Reply:
        """The reply; calls that it makes on the way, and their results, are added to `steps`."""
        told = state.messages(question)
        while True:
            reply = self._turn([*told, *steps], params)
            if not reply.calls or self.caller is None or reply.finish_reason == "cancelled":
                return reply
            for call in reply.calls:
                try:
                    result = self.caller.run(call)
                except KeyboardInterrupt:
                    return replace(reply, text="", finish_reason="cancelled")
                steps += as_steps(reply.text, reply.thought, call, result)

    def _turn(self, told: list[dict[str, Any]], params: SamplingParams) -> Reply:
        """One message of the model, shown."""
        out = None if self.quiet else sys.stdout
        toolbox = self._toolbox(told)
        if toolbox is None:
            reply = show(self.llm.reply(told, params), out)
        else:
            thinking = told[-1]["role"] == "tool"
            reply = show(self.llm.reply(told, params, toolbox), out, ReplyParser(toolbox, thinking=thinking))
            if reply.thought and reply.calls:
                console.note(f"thought: {reply.thought.strip()}")
        self.last = chunk = reply.last
        if chunk is not None and chunk.dropped_turns:
            console.note(f"the context is full: the model did not see the {_turns(chunk.dropped_turns)}")
        if chunk is not None and self.stats:
            console.note(stats_line(chunk))
        return reply

    def _toolbox(self, told: list[dict[str, Any]]) -> Toolbox | None:
        """The tools of the next message; None where neither it nor any before it has to do with tools."""
        if self.caller is None:
            # a model that sees calls may go on in their format
            return Toolbox() if any(message["role"] == "tool" for message in told) else None
        made = sum(message["role"] == "tool" for message in _since_question(told))
        if made < self.caller.limit:
            return self.caller.toolbox
        console.note(f"{made} calls for one question are enough; the model answers without more")
        return self.caller.spent


def _since_question(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max((place for place, message in enumerate(told) if message["role"] == "user"), default=0)
    return told[last:]


def _not_kept(problem: StoreError) -> None:
    console.note(f"this conversation is not kept: {problem.message}")
    if problem.hint:
        console.note(f"  {problem.hint}")


def _turns(count: int) -> str:
    return "oldest turn" if count == 1 else f"{count} oldest turns"
