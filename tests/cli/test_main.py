"""The way in: verbs are listed and found without loading anything, errors are messages, exit codes tell them apart."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys

import pytest

from qwenlet.cli import VERBS, main
from qwenlet.errors import RequestError


def _processor_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, str]:
    """An environment in which modules are compiled once, as an installed package's are."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**environment, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("compiled"))}


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_quick_and_loads_no_torch(verb, compiled):
    """In processor time, and the best of a few: what else the machine does makes it longer, never shorter."""
    code = (
        "import sys; from qwenlet.cli import main; code = main(sys.argv[1:]);"
        "assert code == 0, code; assert 'torch' not in sys.modules, 'help has loaded torch'"
    )
    command = [sys.executable, "-c", code, *verb.split(), "--help"]
    seconds = []
    while len(seconds) < 8 and min(seconds[1:], default=math.inf) >= 0.3:  # the first run compiles
        before = _processor_seconds()
        done = subprocess.run(command, capture_output=True, text=True, env=compiled)
        seconds.append(_processor_seconds() - before)
        assert done.returncode == 0, done.stderr
        assert "Usage: qwenlet" in done.stdout
    assert min(seconds[1:]) < 0.3, f"{verb} --help took {seconds}"


def test_overview_lists_the_verbs_and_imports_none_of_them():
    code = (
        "import sys; from qwenlet.cli import main; main(['--help']); print([m for m in sys.modules if 'qwenlet' in m])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    overview, _, modules = out.rpartition("\n[")
    assert "'qwenlet.cli'" in modules
    for verb, line in VERBS.items():
        assert f"  {verb:{max(map(len, VERBS))}}  {line}\n" in overview
        assert f"'qwenlet.cli.{verb}'" not in modules


@pytest.mark.parametrize("verb", VERBS)
def test_the_overview_and_the_verb_say_the_same(run, verb):
    first_line = run(verb, "--help").out.split("\n\n")[1]
    assert " ".join(first_line.split()) == VERBS[verb]


def test_unknown_verb_names_the_nearest(run):
    result = run("chta")
    assert result.code == 2
    assert "error: there is no verb 'chta'" in result.err
    assert "hint: did you mean: qwenlet chat" in result.err
    assert run("finetune").code == 2, "a verb of a later version is unknown in this one"


def test_wrong_usage_is_told_from_failure(run):
    unknown_flag = run("chat", "--temprature", "1")
    assert unknown_flag.code == 2
    assert unknown_flag.err.startswith("error: ")
    assert "hint: qwenlet chat --help" in unknown_flag.err
    assert run("chat", "--top-k", "many").code == 2
    refused = run("chat", "-p", "hi", "--temperature", "-1")
    assert refused.code == 1
    assert "temperature is -1.0, expected a number at least 0" in refused.err


def test_version(run):
    from qwenlet import __version__

    assert run("--version").out == f"qwenlet {__version__}\n"


def test_nothing_at_all_shows_the_overview(run):
    result = run()
    assert result.code == 2
    assert "Verbs:" in result.out


def _failing(monkeypatch, problem):
    module = importlib.import_module("qwenlet.cli.pull")

    def fail(*args, **options):
        raise problem

    monkeypatch.setattr(module, "app", fail)


@pytest.mark.parametrize(
    ("problem", "code", "expected"),
    [
        (RequestError("seen", hint="do this"), 1, "error: seen\nhint: do this\n"),
        (RequestError("\x1b[31mred"), 1, "error: [31mred\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (ZeroDivisionError("oh"), 1, "error: this should not have happened: ZeroDivisionError: oh\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_errors_are_messages(run, monkeypatch, problem, code, expected):
    _failing(monkeypatch, problem)
    result = run("pull", "x")
    assert result.code == code
    assert result.err.startswith(expected)
    assert "Traceback" not in result.err


def test_debug_shows_the_traceback(run, monkeypatch):
    _failing(monkeypatch, RequestError("seen"))
    monkeypatch.setenv("QWENLET_DEBUG", "1")
    with pytest.raises(RequestError):
        main(["pull", "x"])


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m qwenlet tokenize --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert done.stderr == ""


def test_no_color_is_honoured_and_pipes_get_none(run):
    assert "\x1b" not in run("chta").err
