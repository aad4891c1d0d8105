r"""MBPP: 974 short functions in words with three tests each, of which 500 are asked (Austin et al., arXiv:2108.07732).

A line of mbpp/mbpp.jsonl, shortened:

    {"text": "Write a function to find the similar elements from the given two tuple lists.", "code": "def
    similar_elements(test_tup1, test_tup2):\r\n  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
    "task_id": 2, "test_setup_code": "", "test_list": ["assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
    ...], "challenge_test_list": []}

Three examples (2, 3 and 4) in the paper's form come first, in a chat as earlier turns. mbpp:sanitized asks those of the
500 that were looked through by hand. mbpp:n=20,t=0.8 is as for HumanEval.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Self

from qwenlet.chat import Message
from qwenlet.checkpoint import DEFAULT_SYSTEM
from qwenlet.evals import sandbox
from qwenlet.evals.attempts import AttemptsTask
from qwenlet.evals.programs import definitions
from qwenlet.evals.task import Bench, Continuation, Dialogue, Sample

FULL, SANITIZED = "mbpp/mbpp.jsonl", "mbpp/sanitized-mbpp.json"
EXAMPLES, ASKED = (2, 3, 4), range(11, 511)
_DONE = "[DONE]"


class Mbpp(AttemptsTask):
    """Three examples, then the task; the reply is read up to [DONE]."""

    name = "mbpp"
    title = "MBPP (3-shot)"
    kind = "generation"
    sanitized = False

    def with_argument(self, argument: str) -> Self:
        if argument != "sanitized":
            return super().with_argument(argument)
        task = copy.copy(self)
        task.sanitized = True
        task.name, task.title = f"{self.name}:{argument}", f"{self.title}, sanitized"
        return task

    def samples(self, bench: Bench) -> list[Sample]:
        sandbox.check()
        rows = {row["task_id"]: _plain(row) for row in bench.data.json_lines(FULL)}
        examples = [rows[number] for number in EXAMPLES]
        if self.sanitized:
            rows = {row["task_id"]: _plain(row) for row in bench.data.json(SANITIZED)}
        return [
            Sample(
                str(number),
                self.question(rows[number], examples),
                rows[number]["code"],
                fields={name: rows[number][name] for name in ("name", "tests", "before")},
            )
            for number in ASKED
            if number in rows
        ]

    def question(self, row: dict[str, Any], examples: list[dict[str, Any]]) -> Continuation | Dialogue:
        shots = "".join(f"{_asked(example)}{_answered(example)}\n\n" for example in examples)
        return Continuation(f"{shots}{_asked(row)}", self.params(stop=(_DONE, "\n\nYou are an expert")))

    def programs(self, sample: Sample, text: str) -> dict[str, str | None]:
        """Published: up to [DONE]. Improved: the code that defines what the tests call."""
        published = text.split(_DONE)[0].split("[BEGIN]")[-1].strip()
        return {
            "published": published or None,
            "improved": definitions(text.split(_DONE)[0].replace("[BEGIN]", "\n"), sample.fields["name"]),
        }

    def tests(self, sample: Sample) -> str:
        return "\n".join((sample.fields["before"], *sample.fields["tests"]))


class MbppChat(Mbpp):
    """The same as a conversation."""

    name = "mbpp-chat"
    title = "MBPP (3-shot, chat)"
    chat = True

    def question(self, row: dict[str, Any], examples: list[dict[str, Any]]) -> Continuation | Dialogue:
        messages = [Message("system", DEFAULT_SYSTEM)]
        for example in examples:
            messages += [Message("user", _asked(example)), Message("assistant", _answered(example))]
        return Dialogue((*messages, Message("user", _asked(row))), self.params())


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The two files in one form: text, code, tests, what stands before them, and the name that the tests call."""
    tests = [test.replace("\r\n", "\n") for test in row["test_list"]]
    before = row.get("test_setup_code", "") or "\n".join(row.get("test_imports", ()))
    code = row["code"].replace("\r\n", "\n")
    return {
        "text": row.get("text", row.get("prompt")), "code": code, "tests": tests, "before": before,
        "name": called(code, tests),
    }  # fmt: skip


def called(code: str, tests: list[str]) -> str:
    """The function of the reference solution that the tests call; of several the last."""
    names = re.findall(r"^def\s+(\w+)", code, re.M)
    found = [name for name in names if any(re.search(rf"\b{name}\s*\(", test) for test in tests)]
    return (found or names or [""])[-1]


def _asked(row: dict[str, Any]) -> str:
    tests = "\n".join(row["tests"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _answered(row: dict[str, Any]) -> str:
    return f"{row['code']}\n{_DONE}"
