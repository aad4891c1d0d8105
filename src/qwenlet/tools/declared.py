"""Tools as OpenAI's clients declare them, and which of them a reply may or must call."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qwenlet.errors import RequestError

Mode = Literal["none", "auto", "required"]
MAX_TOOLS = 128
MAX_NAME = 64  # characters


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        arguments: what the model wrote: JSON text, unless it slipped.
    """

    id: str
    name: str
    arguments: str


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Tool:
    """One declared function. Raises RequestError for a name or a schema that can't be used.

    Attributes:
        parameters: JSON schema of an object; left out, the function takes nothing.
        human_name: what the prompt calls its API; the name, unless the published fields say otherwise.
        strict: asked for; arguments follow the schema wherever a call is forced.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    human_name: str = ""
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise RequestError(f"a tool has the name {self.name!r}, expected a text that is not empty")
        if len(self.name) > MAX_NAME or not self.name.isprintable() or self.name != self.name.strip():
            raise RequestError(
                f"a tool has the name {self.name!r:.100}, expected one line of at most {MAX_NAME} characters"
            )
        if not isinstance(self.description, str):
            raise RequestError(f"the tool {self.name} has the description {self.description!r:.100}, expected text")
        if not isinstance(self.parameters, Mapping) or self.parameters.get("type", "object") != "object":
            raise RequestError(
                f"the tool {self.name} has the parameters {self.parameters!r:.100}, expected a JSON schema of an object"
            )
        try:
            self.schema_text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the parameters of the tool {self.name} are not JSON: {error}") from None

    @property
    def schema_text(self) -> str:
        return json.dumps(dict(self.parameters), ensure_ascii=False, allow_nan=False)

    @classmethod
    def of(cls, declared: Any) -> Tool:
        """A tool from OpenAI's forms: {"type": "function", "function": {...}}, the flat one, or a legacy function."""
        if not isinstance(declared, Mapping):
            raise RequestError(f"a tool is {declared!r:.100}, expected an object")
        kind = declared.get("type", "function")
        if kind != "function":
            raise RequestError(
                f"a tool has the type {kind!r}, and only 'function' is known here",
                hint="declare it as a function, with its input as a string parameter",
            )
        function = declared.get("function", declared)
        if not isinstance(function, Mapping):
            raise RequestError(f"a tool has the function {function!r:.100}, expected an object")
        if "name" not in function and "name_for_model" not in function:
            raise RequestError(f"a tool has no name: {dict(function)!r:.200}")
        name = function.get("name_for_model", function.get("name"))
        description = function.get("description_for_model", function.get("description"))
        given = {} if function.get("parameters") is None else {"parameters": function["parameters"]}
        return cls(
            name,
            "" if description is None else description,
            human_name=str(function.get("name_for_human", "")),
            strict=function.get("strict") is True,
            **given,
        )


@dataclass(frozen=True)
class ToolChoice:
    """Whether the reply calls tools.

    Attributes:
        names: only these may be called; None: any.
    """

    mode: Mode = "auto"
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, value: Any) -> ToolChoice:
        """From OpenAI's forms: a mode, a named function (nested or flat, or legacy {"name": ...}), or allowed_tools."""
        if value is None:
            return cls()
        if isinstance(value, str) and value in get_args(Mode):
            mode: Any = value
            return cls(mode)
        if isinstance(value, Mapping):
            kind = value.get("type", "function")
            if kind == "allowed_tools":
                allowed = value.get("allowed_tools", value)
                if isinstance(allowed, Mapping) and isinstance(allowed.get("tools"), Sequence):
                    mode = allowed.get("mode", "auto")
                    if mode not in ("auto", "required"):
                        raise RequestError(f"tool_choice has the mode {mode!r}, expected 'auto' or 'required'")
                    return cls(mode, tuple(_named(tool) for tool in allowed["tools"]))
            elif kind == "function":
                return cls("required", (_named(value),))
        raise RequestError(
            f"tool_choice is {value!r:.200}, expected 'none', 'auto', 'required', a named function or allowed_tools"
        )


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request. Raises RequestError for a name that is given twice, or chosen and not declared.

    Attributes:
        parallel: True: the reply may hold several calls; False: at most one; None: as published, which is one.
        legacy: declared as `functions`, and so to be answered by `function_call`.
    """

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice()
    parallel: bool | None = None
    legacy: bool = False

    def __post_init__(self) -> None:
        if len(self.tools) > MAX_TOOLS:
            raise RequestError(f"{len(self.tools)} tools are declared, and at most {MAX_TOOLS} are taken")
        names = [tool.name for tool in self.tools]
        if len(names) != len(set(names)):
            raise RequestError(f"the tool {next(n for n in names if names.count(n) > 1)} is declared twice")
        if unknown := [name for name in self.choice.names or () if name not in names]:
            raise RequestError(f"tool_choice names {unknown[0]!r}, which is not among the tools: {', '.join(names)}")
        if self.choice.mode == "required" and not self.offered:
            raise RequestError("tool_choice requires a call, but no tools are given")

    @classmethod
    def of(
        cls,
        tools: Any = None,
        tool_choice: Any = None,
        parallel_tool_calls: Any = None,
        functions: Any = None,
        function_call: Any = None,
    ) -> Toolbox:
        """From the fields of a request."""
        if functions is not None and tools is not None:
            raise RequestError("both tools and functions are given", hint="functions is the old name; use tools")
        legacy = functions is not None
        if legacy and tool_choice is not None:
            raise RequestError("both functions and tool_choice are given", hint="functions go with function_call")
        if legacy and parallel_tool_calls:
            raise RequestError("both functions and parallel_tool_calls are given", hint="several calls need tools")
        if not legacy and function_call is not None:
            raise RequestError("function_call is given without functions", hint="tools go with tool_choice")
        declared = functions if legacy else tools
        if declared is not None and (not isinstance(declared, Sequence) or isinstance(declared, str)):
            raise RequestError(f"{'functions' if legacy else 'tools'} is {declared!r:.100}, expected a list")
        if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
            raise RequestError(f"parallel_tool_calls is {parallel_tool_calls!r}, expected true or false")
        choice = ToolChoice.of(function_call if legacy else tool_choice)
        parallel = False if legacy else parallel_tool_calls
        return cls(tuple(Tool.of(one) for one in declared or ()), choice, parallel, legacy)

    @property
    def offered(self) -> tuple[Tool, ...]:
        """What the reply may call, and the prompt describes."""
        if self.choice.mode == "none":
            return ()
        allowed = self.choice.names
        return self.tools if allowed is None else tuple(tool for tool in self.tools if tool.name in allowed)

    def __bool__(self) -> bool:
        return bool(self.offered)


def _named(value: Any) -> str:
    function = value.get("function", value) if isinstance(value, Mapping) else value
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(f"tool_choice holds {value!r:.100}, expected a function with a name")
    return name
