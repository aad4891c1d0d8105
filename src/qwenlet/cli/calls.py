"""A model's calls on their way to Python functions: shown, allowed or not, run, and their results said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from qwenlet.cli import console
from qwenlet.tools import Call, Toolbox, ToolChoice
from qwenlet.tools.functions import Function

Answer = Literal["yes", "no", "always"]
REFUSED = "Error: the user did not allow this call."
_SHOWN = 300  # characters of a result that the user sees


class Caller:
    """Runs calls for one conversation.

    Args:
        functions: by name.
        limit: calls that one question may lead to.
        ask: whether a call may run; None: all may.
    """

    def __init__(
        self, functions: Mapping[str, Function], limit: int, ask: Callable[[str], Answer] | None = None
    ) -> None:
        self.limit = limit
        self._functions = functions
        self._ask = ask
        self._always: set[str] = set()
        self.toolbox = Toolbox(tuple(function.tool for function in functions.values()))
        # once the limit is reached the model answers out of what it has
        self.spent = Toolbox(self.toolbox.tools, ToolChoice("none"))

    def run(self, call: Call) -> str:
        """The result as text; a call that is not allowed or fails has one too. KeyboardInterrupt passes through."""
        console.message(f"call {call.name}({' '.join(call.arguments.split())})", style="bold")
        if self._ask is not None and call.name not in self._always:
            answer = self._ask(call.name)
            if answer == "no":
                return REFUSED
            if answer == "always":
                self._always.add(call.name)
        result = self._functions[call.name].call(call.arguments)
        words = " ".join(result.split())
        console.note(f"result: {words[:_SHOWN]}{'…' if len(words) > _SHOWN else ''}")
        return result


def ask_on_terminal(name: str) -> Answer:
    """Asks until it is clear; the end of input is a no."""
    while True:
        said = console.ask(f"run it? [y]es, [n]o, [a]lways {name}: ").strip().lower()
        for answer in get_args(Answer):
            if said and answer.startswith(said):
                return answer
        if not said:
            return "no"


def as_steps(call_text: str, thought: str, call: Call, result: str) -> list[dict[str, Any]]:
    """A call and its result as OpenAI's clients keep them."""
    function = {"name": call.name, "arguments": call.arguments}
    calling: dict[str, Any] = {
        "role": "assistant",
        "content": call_text,
        "tool_calls": [{"id": call.id, "type": "function", "function": function}],
    }
    if thought:
        calling["reasoning_content"] = thought
    return [calling, {"role": "tool", "content": result, "tool_call_id": call.id}]
