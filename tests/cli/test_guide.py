"""docs/guides/conversations.md as it stands: its Python runs, its commands are ones that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qwenlet.cli import slash
from qwenlet.cli.completion import verbs
from qwenlet.tools.functions import functions_of_file

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "conversations.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"qwenlet [^\n`)]*", "\n".join(re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL)))


def test_the_store_in_python(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QWENLET_DATA", str(tmp_path))
    [code] = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(code, "guide", "exec"), {})
    assert capsys.readouterr().out == "['What is snow?']\n['What is rain?', 'What is rain?']\n"


def test_the_file_of_tools(tmp_path):
    [code] = re.findall(r"```python tools.py\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "tools.py").write_text(code)
    clock = functions_of_file(tmp_path / "tools.py")["clock"]
    assert clock.tool.parameters["properties"]["zone"]["description"] == "a time zone, such as Europe/Rome."
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d\+00:00", clock.call('{"zone": "UTC"}'))
    assert clock.call('{"zone": "Nowhere/Else"}').startswith("Error: ZoneInfoNotFoundError")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    words = shlex.split(command.partition(" > ")[0])[1:]
    known = {verb.words: verb for verb in verbs()}
    verb = known[tuple(words[: 2 if words[0] == "history" else 1])]
    names = {name for option in verb.options for name in option.names}
    assert {word for word in words if re.fullmatch(r"--?[a-z].*", word)} <= names


def test_slash_commands():
    named = set(re.findall(r"`/([a-z]+)", GUIDE))
    assert named
    assert named <= slash.COMMANDS.keys()
