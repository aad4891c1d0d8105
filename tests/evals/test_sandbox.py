"""The sandbox itself: what it tells of ordinary programs, and what it says where it can't be."""

from __future__ import annotations

import platform
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from evals.boxed import box, need_sandbox
from qwenlet.errors import SandboxError
from qwenlet.evals import sandbox
from qwenlet.evals.seccomp import CLONE, DENIED, SOCKET, filter_program


@pytest.fixture
def _fresh() -> Iterator[None]:
    """The interpreter that was found is forgotten, before and after."""
    sandbox.interpreter.cache_clear()
    yield
    sandbox.interpreter.cache_clear()


def test_an_ordinary_program() -> None:
    need_sandbox()
    outcome = box("import math\nprint('π is', round(math.pi, 2))")
    assert outcome.ok
    assert (outcome.stdout, outcome.stderr) == ("π is 3.14\n", "")
    assert outcome.summary == "exit 0"


def test_a_program_that_fails_shows_its_lines() -> None:
    need_sandbox()
    outcome = box("def add(a, b):\n    return a - b\nassert add(1, 1) == 2, 'one and one'")
    assert (outcome.ending, outcome.code) == ("exit", 1)
    assert outcome.summary == "exit 1: AssertionError: one and one"
    assert "line 3" in outcome.stderr


def test_a_program_that_is_none() -> None:
    need_sandbox()
    assert "SyntaxError" in box("def f(:").summary
    assert "SyntaxError" in box("print('\0')").summary
    assert box("print('\ud800')").ok  # half a surrogate, as a model may write: a question mark instead


def test_a_signal_has_its_number() -> None:
    need_sandbox()
    outcome = box("import os\nos.abort()")
    assert (outcome.ending, outcome.code) == ("signal", signal.SIGABRT)
    assert outcome.summary == "signal 6"


def test_many_run_side_by_side_and_come_in_order() -> None:
    need_sandbox()
    programs = [f"import time\ntime.sleep({0.2 if n % 2 else 0})\nprint({n})" for n in range(6)]
    outcomes = list(sandbox.run_all(programs))
    assert [int(outcome.stdout) for outcome in outcomes] == list(range(6))


def test_an_exit_code_above_all_signals_is_one() -> None:
    need_sandbox()
    outcome = box("raise SystemExit(250)")
    assert (outcome.ending, outcome.code) == ("exit", 250)


def test_a_python_at_home_brings_no_home_along() -> None:
    options = sandbox._box("/home/ada/bin/python3.12", sandbox.Limits())
    shown = [path for path in options if path.startswith("/home")]
    assert set(shown) == {"/home/ada/bin", "/home/ada/lib", "/home/ada/lib64"}


@pytest.mark.usefixtures("_fresh")
def test_without_bubblewrap_it_refuses_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="not installed") as caught:
        sandbox.run("print('never')")
    assert "apt-get install bubblewrap" in str(caught.value)


@pytest.mark.usefixtures("_fresh")
def test_where_bubblewrap_can_not_start_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel that forbids namespaces: the program is never run otherwise."""
    monkeypatch.setattr(sandbox, "_command", lambda: "/bin/false")
    with pytest.raises(SandboxError, match="did not start") as caught:
        sandbox.check()
    assert "user namespaces" in str(caught.value)


@pytest.mark.usefixtures("_fresh")
def test_an_older_bubblewrap_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    need_sandbox()
    sandbox.interpreter.cache_clear()
    box_of = sandbox._box
    monkeypatch.setattr(sandbox, "_box", lambda *given: ["--new-option", *box_of(*given)])
    with pytest.raises(SandboxError, match="Unknown option --new-option"):
        sandbox.check()


def test_a_machine_without_known_calls_is_refused() -> None:
    with pytest.raises(SandboxError, match="riscv64"):
        filter_program("riscv64")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_does_what_its_table_says(machine: str) -> None:
    """The program, interpreted here, against the table, for every call number and for clone's flags."""
    code = list(struct.iter_unpack("=HBBI", filter_program(machine)))
    column = ["x86_64", "aarch64"].index(machine)
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

    def verdict(number: int, argument: int = 0, arch: int = architecture) -> int:
        at, held, seen = 0, 0, {0: number, 4: arch, 16: argument}
        while True:
            operation, yes, no, k = code[at]
            at += 1
            if operation == 0x20:
                held = seen[k]
            elif operation == 0x06:
                return k
            else:
                holds = {0x15: held == k, 0x35: held >= k, 0x45: bool(held & k)}[operation]
                at += yes if holds else no

    denied = {numbers[column] for numbers in DENIED.values()}
    for number in range(600):
        if number == SOCKET[column]:
            continue
        expected = refuse if number in denied else absent if number == 435 else allow
        assert verdict(number) == expected, number
    assert verdict(CLONE[column], 0x11) == allow
    assert verdict(CLONE[column], 0x3D0F00) == allow  # a thread
    assert verdict(CLONE[column], 0x10000000) == refuse
    for family in range(64):
        expected = allow if family in (1, 2, 10) else 0x00050061
        assert verdict(SOCKET[column], family) == expected, family
    assert verdict(0, arch=0x40000003) == kill
    if machine == "x86_64":
        assert verdict(0x40000000 + 101) == absent


def test_the_filters_numbers_are_the_kernels() -> None:
    """Against the headers of this machine, where it has them."""
    paths = [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm/unistd_64.h")]
    header = next((path for path in paths if path.exists()), None)
    if header is None or platform.machine() != "x86_64":
        pytest.skip("no kernel headers of x86_64 on this machine")
    numbers = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    for name, (number, _) in DENIED.items():
        assert numbers.get(f"__NR_{name}", str(number)) == str(number), name
