"""Programs in a model's replies: found, cut to what is code, run with tests, and counted as pass@k.

    judge          programs with tests -> verdicts, in the sandbox
    body           the rest of a function whose head was the prompt
    definitions    code of a reply that defines a name
    pass_at_k      of n attempts of which c pass: would one of k have passed?

Running is left to `sandbox`. Reading the code (ast) happens here, on text of bounded length.
"""

from __future__ import annotations

import ast
import math
import re
import secrets
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwenlet.evals import sandbox

_LONGEST = 20_000  # characters of a reply that are looked at
_FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[ \t]*(?P<kind>[\w+-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*(?:```|~~~)|\Z)", re.S | re.M
)
_FIRST_CODE = re.compile(r"^(?:from|import|def|class|async def|@)\b", re.M)


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed, and how it ended: "passed", "exit 1: AssertionError", "time limit"."""

    passed: bool
    ending: str


def judge(programs: Sequence[tuple[str, str]], limits: sandbox.Limits | None = None, workers: int = 2) -> list[Verdict]:
    """Runs (code, tests) pairs, `workers` at a time; equal ones once.

    A program passes if it comes to its end and says a word that was drawn for it: code that leaves early with success
    has not passed.
    """
    unique = list(dict.fromkeys(programs))
    word = secrets.token_hex(16)
    last = f"\nimport os as _os\n_os.write(1, b'\\n{word}')\n"
    outcomes = sandbox.run_all((f"{code}\n{tests}\n{last}" for code, tests in unique), limits, workers)
    verdicts = {pair: _verdict(outcome, word) for pair, outcome in zip(unique, outcomes, strict=True)}
    return [verdicts[pair] for pair in programs]


def _verdict(outcome: sandbox.Outcome, word: str) -> Verdict:
    if outcome.ok and word in outcome.stdout:
        return Verdict(True, "passed")
    return Verdict(False, "left before the tests" if outcome.ok else outcome.summary)


def pass_at_k(attempts: int, passed: int, k: int) -> float:
    """The share of all choices of k attempts that hold one that passed (Chen et al., arXiv:2107.03374): unbiased."""
    assert 0 <= passed <= attempts, f"{passed} of {attempts} attempts"
    assert 1 <= k <= attempts, f"pass@{k} of {attempts} attempts"
    return 1.0 - math.comb(attempts - passed, k) / math.comb(attempts, k)


# ------------------------------------------------------------------------------------------------------- reading


def body(text: str) -> str:
    """The beginning of `text` that is indented or blank: what a function's body goes on with.

    Its end is the first line at the margin, or a fence.
    """
    lines: list[str] = []
    depth = 0  # of brackets and long strings a line at the margin may lie in
    for line in text[:_LONGEST].split("\n"):
        if line.lstrip().startswith("```") or (line and not line[0].isspace() and depth == 0 and lines):
            break
        lines.append(line)
        depth = _open("\n".join(lines))
    return "\n".join(lines).rstrip() + "\n"


def _open(text: str) -> int:
    """1 where a long string is open at the end of `text`, else 0."""
    return max(text.count('"""') % 2, text.count("'''") % 2)


def definitions(text: str, name: str, before: str = "") -> str | None:
    """Code of a reply that defines the function `name`, with its imports and helpers; None where there is none.

    Fenced blocks are tried first, then the whole text, then everything from the first line that looks like code on,
    cut line by line from its end until it can be parsed.

    Args:
        before: what stands before the code when it runs, such as imports.
    """
    text = text.replace("\r\n", "\n")[:_LONGEST]
    fenced = [match["code"] for match in _FENCE.finditer(text)]
    for code in (*fenced, "\n".join(fenced), text):
        if defines(before + code, name):
            return code
    unfenced = text if not fenced else "\n".join(fenced)
    for match in _FIRST_CODE.finditer(unfenced):
        code = _parsable(unfenced[match.start() :])
        if code is not None and defines(before + code, name):
            return code
    return None


def defines(code: str, name: str) -> bool:
    """Whether code can be parsed and defines a function of that name at its margin."""
    tree = parsed(code)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return tree is not None and any(isinstance(node, functions) and node.name == name for node in tree.body)


def parsed(code: str) -> ast.Module | None:
    """The syntax tree; None for what is no Python, such as a return outside of a function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            tree = ast.parse(code)
            compile(code, "reply", "exec", dont_inherit=True)
            return tree
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _parsable(text: str) -> str | None:
    """The longest beginning, in whole lines, that can be parsed."""
    lines = text.split("\n")
    for end in _ends(lines):
        code = "\n".join(lines[:end])
        if parsed(code) is not None:
            return code
    return None


def _ends(lines: Sequence[str]) -> Iterable[int]:
    """Numbers of lines at which code may end, the largest first: before a line at the margin."""
    yield len(lines)
    for number in range(len(lines) - 1, 0, -1):
        if lines[number] and not lines[number][0].isspace():
            yield number
