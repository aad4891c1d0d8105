"""Flags made from dataclasses, so that a field's name, type, default and meaning are written once, where it is defined.

    @app.command()
    @expand
    def chat(sampling: Annotated[dict[str, Any], Flags(SamplingParams)]) -> None: ...

gives `chat` one flag for each field of SamplingParams and passes a dict of those that were used. A flag that was not
used is absent, so the dataclass's own default holds. Help texts come from the docstring's "Attributes:" section.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from qwenlet.cli import console
from qwenlet.config import EngineConfig
from qwenlet.errors import RequestError


@dataclass(frozen=True)
class Flags:
    """Marks a `dict[str, Any]` parameter that takes the flags of a dataclass, without the fields in `skip`."""

    of: type
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadOptions:
    """How a model is found and loaded; None leaves it to `qwenlet.load`.

    Attributes:
        device: where the model runs: auto, cpu, cuda, cuda:1 ...
        dtype: precision of the weights: auto, bf16, fp16 or fp32; auto follows the checkpoint and the device.
        quant: int4 or int8 rounds the weights once and keeps the result; stored runs the file's own codes, none makes
            floats of them.
        revision: a commit, tag or branch of the model on the hub.
        offline: use only what is on this machine; no connection is opened.
        adapter: a LoRA adapter to load beside the model, as NAME=DIR, or DIR for a name like its folder's; may be given
            several times.
    """

    device: str | None = None
    dtype: str | None = None
    quant: str | None = None
    revision: str | None = None
    offline: bool | None = None
    adapter: Sequence[str] | None = None


LoadFlags = Annotated[dict[str, Any], Flags(LoadOptions)]
EngineFlags = Annotated[dict[str, Any], Flags(EngineConfig)]


def adapter_names(loading: dict[str, Any]) -> tuple[str, ...]:
    """Turns the adapters of the command line into what `qwenlet.load` takes, in place; their names in order."""
    named: dict[str, Path] = {}
    for given in loading.pop("adapter", ()):
        name, equals, folder = given.partition("=")
        path = Path(folder if equals else name).expanduser()
        name = name if equals else path.resolve().name
        if not name or name in named:
            raise typer.BadParameter(
                f"{given!r}: the name {name!r} is {'taken' if name else 'empty'}", param_hint="--adapter"
            )
        named[name] = path
    if named:
        loading["adapters"] = named
    return tuple(named)


def new_app() -> typer.Typer:
    """A typer app whose help is plain text: rich's panels would take a third of the time budget of `--help`."""
    return typer.Typer(
        add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False
    )


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """Replaces every parameter marked with Flags by one keyword parameter for each field."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, list[str]] = {}
    for parameter in signature.parameters.values():
        hint = hints[parameter.name]
        marker = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Flags)), None)
        if marker is None:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            flags = _flags(marker)
            groups[parameter.name] = [flag.name for flag in flags]
            parameters += flags

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        for group, names in groups.items():
            used = {name: values.pop(name) for name in names}
            values[group] = {name: value for name, value in used.items() if value not in (None, [], ())}
        function(**values)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return wrapper


def _flags(marker: Flags) -> list[inspect.Parameter]:
    hints, texts = typing.get_type_hints(marker.of), attribute_docs(marker.of)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(field, hints[field.name], texts.get(field.name, "")),
        )
        for field in dataclasses.fields(marker.of)
        if field.name not in marker.skip
    ]


def _annotation(field: dataclasses.Field[Any], hint: Any, text: str) -> Any:
    kind, choices = _flag_type(hint)
    flag = "--" + field.name.replace("_", "-")
    text = text[:1].upper() + text[1:]
    if choices := choices or field.metadata.get("choices", ()):
        text += f" One of: {', '.join(choices)}."
    if field.default not in (None, (), False, dataclasses.MISSING):
        default = field.default if field.default is not True else flag
        text += f" [default: {default}]"
    if kind is bool and field.default is True:
        flag = f"{flag}/--no-{flag[2:]}"
    if get_origin(kind) is collections.abc.Mapping:
        text += " Given as a file, or as the text itself."
        option = typer.Option(flag, help=text, show_default=False, parser=_json_text, metavar="<file or JSON>")
        return Annotated[str | None, option]
    known = list(choices)
    completes = (lambda: known) if known else None
    return Annotated[kind | None, typer.Option(flag, help=text, show_default=False, autocompletion=completes)]


def _flag_type(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The type a flag takes for a field's type, and the values it is limited to."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    sequence = next((kind for kind in kinds if get_origin(kind) is collections.abc.Sequence), None)
    if sequence is not None:
        return list[get_args(sequence)[0]], ()  # type: ignore[misc]
    if get_origin(kind) is Literal:
        return str, get_args(kind)
    return kind, ()


def _json_text(value: str) -> str:
    """JSON as it was typed, or what the file of that name holds; whether it is good, the dataclass says."""
    if value.lstrip().startswith(("{", "[")):
        return value
    try:
        return console.file_text(Path(value))
    except RequestError as problem:
        raise typer.BadParameter(problem.message) from None


def attribute_docs(cls: type) -> dict[str, str]:
    """The "Attributes:" section of a docstring as {name: text}; one entry may name several, with commas between."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    docs: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", section.partition("\n\n")[0]):
        names, _, text = entry.partition(":")
        for name in names.split(","):
            docs[name.strip()] = " ".join(text.split())
    return docs
