"""Python functions as tools: type hints become the JSON schema, the docstring says what it is for, a call runs it.

    def weather(city: str, days: int = 1) -> str:
        \"\"\"The forecast for a city.

        Args:
            city: its name, in English.
        \"\"\"

`functions_of_file` runs a file of such functions: it is the user's own program, as if started with `python FILE`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qwenlet.errors import MissingExtraError, RequestError
from qwenlet.tools.declared import Tool

MAX_RESULT = 8_000  # characters; a few thousand tokens, which is what a context has room for
_MODULE = "qwenlet_tools_file"


@dataclass(frozen=True)
class Function:
    """A function that the model may call.

    Attributes:
        tool: how it is declared.
        arguments: a msgspec struct with its parameters.
    """

    tool: Tool
    run: Callable[..., Any]
    arguments: type

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Function:
        """Raises RequestError for a parameter without a type, or of one that JSON doesn't have."""
        msgspec = _msgspec()
        name = function.__name__
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except Exception as problem:  # any name in a hint may be wrong in any way
            raise RequestError(f"the type hints of {name} can't be read: {problem}") from None
        about, texts = _described(inspect.getdoc(function) or "")
        fields: list[Any] = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise RequestError(f"{name} takes {parameter}, and a tool's parameters are given by name")
            if parameter.name not in hints:
                raise RequestError(
                    f"the parameter {parameter.name} of {name} has no type hint",
                    hint=f"write {parameter.name}: str, or what it is, so that the model can be told",
                )
            hint = hints[parameter.name]
            if text := texts.get(parameter.name):
                hint = Annotated[hint, msgspec.Meta(description=text)]
            default = [] if parameter.default is parameter.empty else [parameter.default]
            fields.append((parameter.name, hint, *default))
        try:
            arguments = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
            schema = msgspec.json.schema(arguments)
        except Exception as problem:  # TypeError and others, for what JSON doesn't have
            raise RequestError(f"{name} takes what JSON can't say: {problem}") from None
        others = schema["$defs"]
        own = others.pop(name)
        own.pop("title", None)
        parameters = own | ({"$defs": others} if others else {})
        return cls(Tool(name, about, parameters), function, arguments)

    def call(self, arguments: str) -> str:
        """The result as text for the model; what goes wrong within is such a result too, for the model to read.

        What the function prints goes to stderr. A result of more than `MAX_RESULT` characters is cut, and says so.
        """
        msgspec = _msgspec()
        try:
            given = msgspec.convert(msgspec.json.decode(arguments or "{}"), self.arguments, strict=False)
        except (msgspec.MsgspecError, ValueError, RecursionError) as problem:
            return f"Error: the arguments are refused: {problem}"
        values = {name: getattr(given, name) for name in self.arguments.__struct_fields__}  # type: ignore[attr-defined]
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = self.run(**values)
                if inspect.isawaitable(result):
                    result = asyncio.run(_awaited(result))
            text = result if isinstance(result, str) else msgspec.json.encode(result, enc_hook=str).decode()
        except (Exception, SystemExit) as problem:
            text = f"Error: {type(problem).__name__}: {problem}"
        text = text.encode("utf-8", "replace").decode("utf-8")
        left = len(text) - MAX_RESULT
        return text if left <= 0 else f"{text[:MAX_RESULT]}\n[cut here: {left} more characters]"


def functions_of_file(path: Path) -> dict[str, Function]:
    """Runs a Python file and takes its functions: those in `__all__`, or those it defines whose names begin with no _.

    Raises RequestError where it can't be read or fails, or has no function.
    """
    module = _run(path)
    named = getattr(module, "__all__", None)
    found: list[Any]
    if named is None:
        found = [
            thing
            for name, thing in vars(module).items()
            if inspect.isfunction(thing) and thing.__module__ == _MODULE and not name.startswith("_")
        ]
    else:
        found = [getattr(module, name, None) for name in named]
        if strange := [name for name, thing in zip(named, found, strict=True) if not callable(thing)]:
            raise RequestError(f"{path}: __all__ names {strange[0]!r}, which is no function there")
    if not found:
        raise RequestError(
            f"{path} defines no function that could be a tool", hint="names that begin with _ are left out"
        )
    try:
        functions = [Function.of(one) for one in found]
    except RequestError as problem:
        raise RequestError(f"{path}: {problem.message}", problem.hint) from None
    return {one.tool.name: one for one in functions}


def _run(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise RequestError(f"there is no file {path}", hint="--tools takes a Python file with functions")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise RequestError(f"{path} is no Python file", hint="its name has to end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses in it look themselves up
    sys.path.insert(0, str(path.resolve().parent))  # as if it were started: it may import its neighbours
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        line = next((frame.lineno for frame in reversed(traceback.extract_tb(problem.__traceback__))
                     if frame.filename == str(path)), getattr(problem, "lineno", None))  # fmt: skip
        where = "" if line is None else f" in line {line}"
        raise RequestError(f"{path} fails{where}: {type(problem).__name__}: {problem}") from None
    finally:
        sys.path.pop(0)
    return module


def _described(docstring: str) -> tuple[str, Mapping[str, str]]:
    """What a docstring says of the function, in one paragraph, and of each parameter in its "Args:" section."""
    about, _, rest = docstring.partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    texts = {}
    for entry in re.split(r"\n(?= {1,4}\S)", "\n" + section):
        name, colon, text = entry.partition(":")
        if colon:
            texts[name.split("(")[0].strip()] = " ".join(text.split())
    return " ".join(about.split()), texts


async def _awaited(result: Any) -> Any:
    return await result


def _msgspec() -> Any:
    try:
        import msgspec
        import msgspec.json
    except ImportError as problem:
        raise MissingExtraError("msgspec", "tools", "a file of tools") from problem
    return msgspec
