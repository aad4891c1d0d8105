"""Tools as requests declare them: what becomes of their fields, and which field is to blame."""

from __future__ import annotations

import re
from typing import Any

from qwenlet.errors import RequestError
from qwenlet.server.errors import explained
from qwenlet.server.nested import Fields, look
from qwenlet.tools import Toolbox

_BOTH = re.compile(r"both \w+ and (\w+) are given")
_FUNCTION = "name description parameters strict name_for_model name_for_human description_for_model"
_IDLE = "allowed_callers async defer_loading output_schema"  # of OpenAI's functions
_FLAT = Fields.of(f"type {_FUNCTION}", _IDLE)
_NESTED = Fields.of("type", function=Fields.of(_FUNCTION, _IDLE))


def toolbox_of(
    declared: Any = None,
    choice: Any = None,
    parallel: Any = None,
    functions: Any = None,
    function_call: Any = None,
    *,
    ignored: list[str],
    refuse: bool = True,
) -> Toolbox:
    """The tools of a request's fields.

    Args:
        ignored: gets the declarations' fields that have no effect.
        refuse: those that nobody knows are refused, else they are named, too.
    Raises:
        ApiError 400: what can't be used, by its field.
    """
    old = "functions" if functions is not None else "tools"
    try:
        toolbox = Toolbox.of(declared, choice, parallel, functions, function_call)
    except RequestError as problem:
        named = ("tool_choice", "parallel_tool_calls", "function_call")
        param = next((name for name in named if problem.message.startswith(name)), old)
        if functions is not None and param == "tool_choice":
            param = "function_call"
        if both := _BOTH.match(problem.message):
            param = both[1]
        error = explained(problem)
        assert error is not None, "this error has a reason for clients"
        error.param = param
        raise error from None
    for number, tool in enumerate(declared or functions or ()):
        look(tool, _NESTED if "function" in tool else _FLAT, f"{old}[{number}]", ignored, refuse=refuse)
    return toolbox
