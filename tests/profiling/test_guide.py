"""docs/guides/profiling.md as it stands: its Python runs, its commands are ones that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qwenlet.cli.completion import verbs
from qwenlet.profiling import session

from .small import CEILINGS

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "profiling.md").read_text(encoding="utf-8")


def test_the_python(capsys, monkeypatch):
    monkeypatch.setattr(session, "measure_ceilings", lambda device: CEILINGS)  # seconds of every core
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(code, "guide", "exec"), {})
    assert "# Profile of random:tiny" in capsys.readouterr().out


@pytest.mark.parametrize("command", re.findall(r"^qwenlet profile .*", GUIDE, re.MULTILINE))
def test_the_commands(command):
    (verb,) = (verb for verb in verbs() if verb.words == ("profile",))
    names = {name for option in verb.options for name in option.names}
    assert {word for word in shlex.split(command) if word.startswith("--")} <= names


def test_each_option_that_is_named_exists():
    (verb,) = (verb for verb in verbs() if verb.words == ("profile",))
    names = {name for option in verb.options for name in option.names}
    assert set(re.findall(r"`(--[a-z-]+)", GUIDE)) <= names
