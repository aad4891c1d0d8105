"""`qwenlet completion`: a script that lets a shell complete verbs, options, their values and conversation ids.

The script holds everything but the ids, so that a TAB starts no Python; after an update it is made anew.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer

from qwenlet.cli import VERBS
from qwenlet.cli.options import new_app

app = new_app()

# what a value is: a file for all we know, or a conversation of the history
Kind = Literal["file", "conversation"]
_CONVERSATIONS = "qwenlet history list --limit 100 2>/dev/null"


class Shell(StrEnum):
    """A shell that can complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@dataclass(frozen=True)
class Parameter:
    """An option, or an argument where it has no names.

    Attributes:
        values: those it is limited to.
    """

    names: tuple[str, ...]
    help: str
    takes_value: bool
    kind: Kind = "file"
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verb:
    """`words` are the verb and, where there is one, the verb below it."""

    words: tuple[str, ...]
    help: str
    parameters: tuple[Parameter, ...] = ()

    @property
    def options(self) -> tuple[Parameter, ...]:
        return tuple(one for one in self.parameters if one.names)

    @property
    def argument(self) -> Parameter:
        """The first one; of the others there are none that could be completed but files."""
        return next((one for one in self.parameters if not one.names), Parameter((), "", takes_value=True))


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="The shell to write for.")]) -> None:
    """Print a script that completes qwenlet in a shell.

    bash: eval "$(qwenlet completion bash)" in ~/.bashrc. zsh: the same in ~/.zshrc, after compinit. fish:
    qwenlet completion fish > ~/.config/fish/completions/qwenlet.fish
    """
    writers: dict[Shell, Callable[[Sequence[Verb]], Iterator[str]]] = {
        Shell.BASH: bash,
        Shell.ZSH: zsh,
        Shell.FISH: fish,
    }
    print("\n".join(writers[shell](list(verbs()))))


def verbs() -> Iterator[Verb]:
    """Every verb with its options, as the command line itself declares them."""
    for name, line in VERBS.items():
        module = importlib.import_module(f"qwenlet.cli.{name}")
        command = typer.main.get_command(getattr(module, "COMPLETED", module.app))
        below = getattr(command, "commands", None)
        yield Verb((name,), line, () if below else _parameters(command))
        for under, subcommand in sorted((below or {}).items()):
            yield Verb((name, under), subcommand.get_short_help_str(200), _parameters(subcommand))


def _parameters(command: Any) -> tuple[Parameter, ...]:
    context = command.make_context("qwenlet", [], resilient_parsing=True)
    return tuple(_parameter(one, context) for one in command.get_params(context))


def _parameter(one: Any, context: Any) -> Parameter:
    is_option = one.param_type_name == "option"
    names = (*one.opts, *one.secondary_opts) if is_option else ()
    takes_value = not (is_option and (one.is_flag or one.count))
    found = one.shell_complete(context, "") if takes_value else []
    values = tuple(item.value for item in found if item.type == "plain")
    kind: Kind = "conversation" if one.name in ("id", "ids", "resume") else "file"
    return Parameter(names, " ".join((getattr(one, "help", None) or "").split()), takes_value, kind, values)


# ------------------------------------------------------------------------------------------------------- bash


def bash(all_verbs: Sequence[Verb]) -> Iterator[str]:
    """Where nothing is offered, bash completes file names."""
    parents = _parents(all_verbs)
    yield from (
        "# made by: qwenlet completion bash",
        "_qwenlet() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}",
        '    local verb=${COMP_WORDS[1]} words=""',
        '    if [[ $current == "=" ]]; then current=""; elif [[ $previous == "=" ]]; then',
        "        previous=${COMP_WORDS[COMP_CWORD-2]}",
        "    fi",
        f'    if [[ $COMP_CWORD -eq 1 ]]; then words="{" ".join(_top(all_verbs))} --help --version"; else',
    )
    for parent, below in parents.items():
        yield f'    if [[ $verb == {parent} ]]; then verb="{parent} ${{COMP_WORDS[2]}}"; fi'
        yield f'    if [[ $verb == "{parent} "* && $COMP_CWORD -eq 2 ]]; then words="{" ".join(below)}"; fi'
    yield '    if [[ -z $words ]]; then case "$verb $previous" in'
    for verb in all_verbs:
        for value, names in _by_value(verb.options).items():
            cases = "|".join(f'"{" ".join(verb.words)} {name}"' for name in names)
            yield f"        {cases}) {value} ;;"
    yield '        *) if [[ $current == -* ]]; then case "$verb" in'
    for verb in all_verbs:
        words = " ".join(["--help", *(name for option in verb.options for name in option.names)])
        yield f'            "{" ".join(verb.words)}") words="{words}" ;;'
    yield '        esac; else case "$verb" in'
    for verb in all_verbs:
        if (value := _bash_value(verb.argument)) != "return":
            yield f'            "{" ".join(verb.words)}") {value} ;;'
    yield from (
        "        esac; fi ;;",
        "    esac; fi; fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o bashdefault -o default -F _qwenlet qwenlet",
    )


def _by_value(options: Sequence[Parameter]) -> dict[str, list[str]]:
    """What offers the values -> the names of the options that take such."""
    groups: dict[str, list[str]] = {}
    for option in options:
        if option.takes_value:
            groups.setdefault(_bash_value(option), []).extend(option.names)
    return groups


def _bash_value(option: Parameter) -> str:
    if option.kind == "conversation":
        return f'words=$({_CONVERSATIONS} | cut -d" " -f1)'
    return f'words="{" ".join(option.values)}"' if option.values else "return"


# ------------------------------------------------------------------------------------------------------- zsh


def zsh(all_verbs: Sequence[Verb]) -> Iterator[str]:
    parents = _parents(all_verbs)
    yield from (
        "#compdef qwenlet",
        "# made by: qwenlet completion zsh",
        "_qwenlet_conversations() {",
        "    local -a rows",
        f"    rows=(${{(f)\"$({_CONVERSATIONS} | sed -e 's/:/\\\\:/g' -e 's/  /:/')\"}})",
        "    _describe conversation rows",
        "}",
        "_qwenlet() {",
        "    local curcontext=$curcontext state line",
        "    if (( CURRENT == 2 )); then",
        "        local -a verbs=(",
        *(f"            {_quoted(f'{verb.words[0]}:{verb.help}')}" for verb in all_verbs if len(verb.words) == 1),
        "        )",
        "        _describe verb verbs",
        "        return",
        "    fi",
        "    local verb=$words[2]",
        "    shift words; (( CURRENT-- ))",
    )
    for parent, below in parents.items():
        yield f"    if [[ $verb == {parent} ]]; then"
        yield f"        if (( CURRENT == 2 )); then compadd {' '.join(below)}; return; fi"
        yield f'        verb="{parent} $words[2]"; shift words; (( CURRENT-- ))'
        yield "    fi"
    yield '    case "$verb" in'
    for verb in all_verbs:
        yield f"        {_quoted(' '.join(verb.words))}) _arguments \\"
        for option in verb.options:
            for name in option.names:
                yield f"            {_quoted(_zsh_option(name, option))} \\"
        yield f"            {_quoted(f'*:argument:{_zsh_value(verb.argument)}')} ;;"
    yield from ("    esac", "}", "compdef _qwenlet qwenlet")


def _zsh_option(name: str, option: Parameter) -> str:
    said = option.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    if not option.takes_value:
        return f"*{name}[{said}]"
    equals = "=" if name.startswith("--") else ""
    return f"*{name}{equals}[{said}]:value:{_zsh_value(option)}"


def _zsh_value(parameter: Parameter) -> str:
    if parameter.values:
        return f"({' '.join(parameter.values)})"
    return "_qwenlet_conversations" if parameter.kind == "conversation" else "_files"


# ------------------------------------------------------------------------------------------------------- fish


def fish(all_verbs: Sequence[Verb]) -> Iterator[str]:
    parents = _parents(all_verbs)
    yield "# made by: qwenlet completion fish"
    yield "complete -c qwenlet -n __fish_use_subcommand -f"
    for verb in all_verbs:
        if len(verb.words) == 1:
            said = _quoted(verb.help)
            yield f"complete -c qwenlet -n __fish_use_subcommand -a {verb.words[0]} -d {said}"
    for verb in all_verbs:
        seen = f"__fish_seen_subcommand_from {verb.words[0]}"
        if len(verb.words) == 2:
            others = " ".join(parents[verb.words[0]])
            yield (
                f"complete -c qwenlet -n '{seen}; and not __fish_seen_subcommand_from {others}' "
                f"-f -a {verb.words[1]} -d {_quoted(verb.help)}"
            )
            seen += f"; and __fish_seen_subcommand_from {verb.words[1]}"
        if offered := _fish_offered(verb.argument):
            yield f"complete -c qwenlet -n '{seen}' -f -a {offered}"
        for option in verb.options:
            flags = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            said = f"-d {_quoted(option.help)}"
            yield f"complete -c qwenlet -n '{seen}' {flags} {_fish_value(option)}{said}"


def _fish_value(option: Parameter) -> str:
    if not option.takes_value:
        return ""
    offered = _fish_offered(option)
    return f"-x -a {offered} " if offered else "-r "


def _fish_offered(parameter: Parameter) -> str | None:
    if parameter.kind == "conversation":
        return _quoted(f'({_CONVERSATIONS} | string replace "  " \\t)')
    return _quoted(" ".join(parameter.values)) if parameter.values else None


# ------------------------------------------------------------------------------------------------------- all


def _top(all_verbs: Sequence[Verb]) -> list[str]:
    return [verb.words[0] for verb in all_verbs if len(verb.words) == 1]


def _parents(all_verbs: Sequence[Verb]) -> dict[str, list[str]]:
    parents: dict[str, list[str]] = {}
    for verb in all_verbs:
        if len(verb.words) == 2:
            parents.setdefault(verb.words[0], []).append(verb.words[1])
    return parents


def _quoted(text: str) -> str:
    """For all three shells: a quote ends the text, stands alone, and begins it again."""
    return "'" + text.replace("'", "'\\''") + "'"
