"""Code in replies: what is taken for it, and what a verdict rests on."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.boxed import need_sandbox
from qwenlet.evals.programs import body, definitions, judge, parsed, pass_at_k
from qwenlet.evals.sandbox import Limits

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3"


def test_verdicts() -> None:
    need_sandbox()
    programs = [
        ADD,
        ADD.replace("+", "-"),
        "def add(a, b):\n    while True: pass",
        "import os\nos._exit(0)",
        "def add(",
    ]
    right, wrong, slow, early, broken = judge([(code, TESTS) for code in programs], Limits(cpu_seconds=1))
    assert right.passed
    assert right.ending == "passed"
    assert [verdict.passed for verdict in (wrong, slow, early, broken)] == [False] * 4
    assert wrong.ending == "exit 1: AssertionError"
    assert slow.ending == "cpu limit"
    assert early.ending == "left before the tests"
    assert "SyntaxError" in broken.ending


def test_leaving_early_by_words_is_seen() -> None:
    """Success by exit code, or by printing what others printed, is no success."""
    need_sandbox()
    for code in (
        "raise SystemExit(0)",
        "print('passed')\nimport sys\nsys.exit()",
        "import os\nos.kill(os.getpid(), 9)",
    ):
        (verdict,) = judge([(code, TESTS)])
        assert not verdict.passed, code


def test_output_of_the_program_does_not_matter() -> None:
    need_sandbox()
    assert judge([(ADD + "print('debug', end='')", TESTS)])[0].passed


@pytest.mark.parametrize("attempts", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices(attempts: int) -> None:
    """Against counting every choice of k attempts."""
    for passed in range(attempts + 1):
        results = [n < passed for n in range(attempts)]
        for k in range(1, attempts + 1):
            choices = list(itertools.combinations(results, k))
            assert pass_at_k(attempts, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_a_body_ends_at_the_margin() -> None:
    text = "    if a:\n        return 1\n\n    return 2\n\n\ndef other():\n    pass\n"
    assert body(text) == "    if a:\n        return 1\n\n    return 2\n"
    assert body("    return 1\n```\nThat's it.") == "    return 1\n"
    assert body("    return 1\nprint(f(2))") == "    return 1\n"


def test_a_body_keeps_long_strings_whole() -> None:
    text = '    x = """\nat the margin\n"""\n    return x\nprint(1)'
    assert body(text) == '    x = """\nat the margin\n"""\n    return x\n'


@pytest.mark.parametrize(
    "reply",
    [
        ADD,
        f"Sure! Here it is:\n```python\n{ADD}```\nIt adds.",
        f"```\n{ADD}```",
        f"~~~py\n{ADD}~~~",
        f"First a usage example:\n```python\nadd(1, 2)\n```\nand the code:\n```python\n{ADD}\n```",
        f"The function:\n\n{ADD}\nIt adds two numbers.",
        f"```python\n{ADD}",  # cut before the fence was closed
        f"Here:\r\n```python\r\n{ADD}```".replace("\n", "\r\n"),
        f"import math\n\n{ADD}",
        f"One = 1\n{ADD}",
    ],
)
def test_code_is_found(reply: str) -> None:
    code = definitions(reply, "add")
    assert code is not None
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["add"](1, 2) == 3  # type: ignore[operator]


def test_helpers_come_along() -> None:
    reply = f"```python\nimport math\n\ndef double(x):\n    return 2 * x\n\n{ADD}```"
    assert "def double" in (definitions(reply, "add") or "")
    split = "```python\nONE = 1\n```\nthen\n```python\ndef f():\n    return ONE\n```"
    assert definitions(split, "f") == "def f():\n    return ONE\n"


@pytest.mark.parametrize(
    "reply", ["", "I can't.", "def sub(a, b):\n    return a - b", "```python\nadd(1, 2)\n```", "def add(:"]
)
def test_no_code_is_none(reply: str) -> None:
    assert definitions(reply, "add") is None


@given(st.text(alphabet="def add(a):\n `'\"\\#x=1[]{}", max_size=200))
def test_wild_replies_are_harmless(reply: str) -> None:
    code = definitions(reply, "add")
    assert code is None or parsed(code) is not None
    assert body(reply).endswith("\n")


@pytest.mark.parametrize("text", ["(" * 5000, "-" * 20000 + "1", "[" * 200 + "]" * 200, "\0", "x = '\\d'"])
def test_code_that_hurts_parsers(text: str) -> None:
    parsed(text)
    definitions(text + "\ndef add(): pass", "add")
