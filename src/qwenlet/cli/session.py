"""A conversation with a loaded model at a terminal: ask, show, keep. Line editing and commands are elsewhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from qwenlet.cli import console
from qwenlet.cli.conversation import Conversation, Exchange, State
from qwenlet.cli.reply import Reply, show, stats_line
from qwenlet.config import SamplingParams
from qwenlet.errors import RequestError

if TYPE_CHECKING:
    from qwenlet.api import LLM
    from qwenlet.engine import Chunk


class Session:
    """What the commands act on.

    Attributes:
        stats: show counts and speed after each reply.
        multiline: Enter starts a new line instead of sending.
        last: the last chunk of the last reply.
        finished: set by /exit.
    """

    def __init__(self, llm: LLM, conversation: Conversation, *, stats: bool = False) -> None:
        self.llm = llm
        self.conversation = conversation
        self.stats = stats
        self.multiline = False
        self.last: Chunk | None = None
        self.finished = False

    @property
    def model_line(self) -> str:
        """What is talking: name, precision, device, context."""
        llm = self.llm
        dtype = str(llm.dtype).removeprefix("torch.")
        return f"{llm.name}: {dtype} on {llm.device}, context of {llm.context_length} tokens"

    def ask(self, question: str) -> Reply:
        """Shows the reply to `question` and keeps both; a question that got no reply at all is not kept.

        Raises QwenletError as the model does; the conversation is unchanged then.
        """
        state = self.conversation.state
        reply = self._reply(state, question, state.params)
        if reply.text:
            self.conversation.add(Exchange(question, reply.text, reply.finish_reason))
        return reply

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
        reply = self._reply(replace(state, exchanges=tuple(earlier)), last.user, params)
        if reply.text:
            exchange = Exchange(last.user, reply.text, reply.finish_reason)
            self.conversation.change("the new reply", replace(state, exchanges=(*earlier, exchange)))
        return reply

    def _reply(self, state: State, question: str, params: SamplingParams) -> Reply:
        reply = show(self.llm.reply(state.messages(question), params), sys.stdout)
        self.last = chunk = reply.last
        if chunk is not None and chunk.dropped_turns:
            console.note(f"the context is full: the model did not see the {_turns(chunk.dropped_turns)}")
        if chunk is not None and self.stats:
            console.note(stats_line(chunk))
        return reply


def _turns(count: int) -> str:
    return "oldest turn" if count == 1 else f"{count} oldest turns"
