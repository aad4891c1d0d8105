"""Python functions as tools: what the model is told of them, and what a call makes of what the model wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.errors import MissingExtraError, RequestError
from qwenlet.tools.functions import MAX_RESULT, Function, functions_of_file

FILE = '''
from __future__ import annotations
import dataclasses, enum, sys
from typing import Literal
from os.path import join  # imported, so no tool

class Unit(enum.Enum):
    C = "celsius"

@dataclasses.dataclass
class Place:
    name: str
    height: float = 0.0

def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """The forecast for
    a city.

    Args:
        city: its name,
            in English.
        days (int): how many.

    Returns:
        Words.
    """
    print("looking")
    return f"{city} {days} {unit}"

def climb(place: Place, units: list[Unit] | None = None) -> dict:
    return {"up": place.height + 1, "units": units, "at": sys}

async def later(seconds: float = 0) -> str:
    return "晚"

def broken() -> str:
    raise ValueError("the bug")

def leave() -> str:
    sys.exit(3)

def long() -> str:
    return "x" * 10_000

def half() -> str:
    return "\\ud800"

def _helper(x): ...
'''


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> dict[str, Function]:
    file = tmp_path_factory.mktemp("tools") / "tools.py"
    file.write_text(FILE)
    return functions_of_file(file)


def test_what_the_model_is_told(functions):
    assert list(functions) == ["weather", "climb", "later", "broken", "leave", "long", "half"]
    tool = functions["weather"].tool
    assert tool.description == "The forecast for a city."
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its name, in English."},
            "days": {"type": "integer", "default": 1, "description": "how many."},
            "unit": {"enum": ["C", "F"], "default": "C"},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    assert set(functions["climb"].tool.parameters["$defs"]) == {"Place", "Unit"}
    assert functions["broken"].tool.parameters["properties"] == {}


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("weather", '{"city": "Paris"}', "Paris 1 C"),
        ("weather", '{"city": "北京", "days": "3", "unit": "F"}', "北京 3 F"),
        ("climb", '{"place": {"name": "x", "height": 2}, "units": ["celsius"]}', None),
        ("later", "", "晚"),
        ("long", "{}", "x" * MAX_RESULT + "\n[cut here: 2000 more characters]"),
        ("half", "{}", "?"),
    ],
)
def test_a_call(functions, capsys, name, arguments, result):
    answer = functions[name].call(arguments)
    if result is None:
        assert answer.startswith('{"up":3.0,"units":["celsius"],"at":"<module')
    else:
        assert answer == result
    shown = capsys.readouterr()
    assert shown.out == "", "stdout is for replies"
    assert shown.err == ("looking\n" if name == "weather" else "")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("weather", '{"city": 1}', "the arguments are refused: Expected `str`, got `int` - at `$.city`"),
        ("weather", "{}", "the arguments are refused: Object missing required field `city`"),
        ("weather", '{"city": "x", "town": 1}', "the arguments are refused: Object contains unknown field `town`"),
        ("weather", '{"city": "x", "unit": "K"}', "the arguments are refused: Invalid enum value 'K'"),
        ("weather", "Paris", "the arguments are refused: JSON is malformed"),
        ("broken", "{}", "ValueError: the bug"),
        ("leave", "{}", "SystemExit: 3"),
    ],
)
def test_what_goes_wrong_is_said_to_the_model(functions, name, arguments, said):
    assert functions[name].call(arguments).startswith(f"Error: {said}")


@given(st.text(alphabet='{}[]":,city1 \\\ud800', max_size=20))
def test_wild_arguments_end_in_a_result(functions, arguments):
    assert isinstance(functions["weather"].call(arguments), str)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1\nraise KeyError('k')", r"tools.py fails in line 2: KeyError: 'k'"),
        ("def f(:", r"tools.py fails in line 1: SyntaxError"),
        ("import sys\nsys.exit(0)", r"tools.py fails in line 2: SystemExit"),
        ("def _f(): ...\nclass C: ...", "defines no function"),
        ("__all__ = ['g']\ndef f(): ...", "__all__ names 'g', which is no function"),
        ("def f(x): ...", "the parameter x of f has no type hint"),
        ("def f(*x: int): ...", r"f takes \*x: int, and a tool's parameters are given by name"),
        ("def f(x: 'Nothing'): ...", "the type hints of f can't be read: name 'Nothing'"),
        ("def f(x: type): ...", "f takes what JSON can't say"),
        ("def f(x: int = object()): ...", "f takes what JSON can't say"),
    ],
)
def test_files_that_are_refused(tmp_path, code, said):
    file = tmp_path / "tools.py"
    file.write_text(code)
    with pytest.raises(RequestError, match=said):
        functions_of_file(file)


def test_a_file_that_is_not_there_or_no_python(tmp_path):
    with pytest.raises(RequestError, match="there is no file"):
        functions_of_file(tmp_path / "none.py")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RequestError, match="is no Python file"):
        functions_of_file(tmp_path / "notes.txt")


def test_a_file_imports_its_neighbours_and_names_its_tools(tmp_path):
    (tmp_path / "neighbour_of_tools.py").write_text("def shout(text: str) -> str:\n    return text.upper()\n")
    file = tmp_path / "tools.py"
    file.write_text("from neighbour_of_tools import shout\n__all__ = ['shout']\ndef quiet(): ...\n")
    before = list(sys.path)
    found = functions_of_file(file)
    assert list(found) == ["shout"]
    assert found["shout"].call('{"text": "a"}') == "A"
    assert sys.path == before


def test_without_msgspec_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(MissingExtraError) as missing:
        Function.of(lambda: None)
    assert missing.value.hint == "pip install 'qwenlet[tools]'"


def test_the_room_does_not_load_msgspec():
    code = "import sys, qwenlet.tools.functions; assert 'msgspec' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
