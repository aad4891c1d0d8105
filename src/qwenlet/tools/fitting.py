"""A conversation with tools, cut to fit the context: what describes the tools counts, and moves to what is kept."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from qwenlet import chat
from qwenlet.chat import Fitted
from qwenlet.errors import ContextLengthError
from qwenlet.tokenizer import Tokenizer
from qwenlet.tools.declared import Toolbox
from qwenlet.tools.prompt import ToolMessage, react_messages


def fit(
    tokenizer: Tokenizer, conversation: Sequence[ToolMessage], toolbox: Toolbox, context_length: int, reserve: int
) -> Fitted:
    """`chat.fit` for the published ReAct format: drops the oldest turns until prompt and reply fit.

    A turn is a user message with everything up to the next one, so a call never loses its result. What is dropped is
    found by halving: each try is a prompt of its own, because the tools are described in a message that is kept.

    Raises:
        ContextLengthError: the last turn and the tools do not fit.
        RequestError, TokenizerError: as `react_messages` and `chat.render`.
    """
    system, turns = chat.exchanges(conversation)

    def rendered(dropped: int) -> Fitted:
        kept = [*system, *(message for turn in turns[dropped:] for message in turn)]
        messages = react_messages(kept, toolbox)
        return Fitted(tuple(messages), chat.render(tokenizer, messages), dropped)

    def fits(dropped: int) -> bool:
        return len(rendered(dropped).ids) + reserve <= context_length

    whole = rendered(0)
    if len(whole.ids) + reserve <= context_length:
        return whole
    dropped = 1 + bisect_left(range(1, len(turns)), True, key=fits)
    if dropped >= len(turns):
        raise ContextLengthError(len(rendered(len(turns) - 1).ids), context_length, reserve)
    return rendered(dropped)
