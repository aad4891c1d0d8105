"""Tasks judged by running what the model wrote, once or n times: pass@k, by the published extraction and by ours."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from qwenlet.config import SamplingParams
from qwenlet.errors import EvalError
from qwenlet.evals.programs import Verdict, judge, pass_at_k
from qwenlet.evals.task import GREEDY, Answer, Bench, Sample, Scored, Task

RULES = ("published", "improved")
_KS = (1, 10, 100)


class AttemptsTask(Task):
    """Programs are found in replies by two rules, run with tests, and counted.

    Attributes:
        attempts: replies per problem.
        temperature: of more than one.
    """

    measures: tuple[str, ...] = ("pass@1", "pass@1, improved extraction")
    attempts = 1
    temperature = 0.0

    def with_argument(self, argument: str) -> Self:
        """n=20,t=0.8: so many attempts, at that temperature. Raises EvalError."""
        try:
            given = {key: float(value) for key, value in (part.split("=") for part in argument.split(","))}
            count, temperature = int(given.pop("n")), given.pop("t", 0.8)
        except (ValueError, KeyError):
            given, count, temperature = {"": 0.0}, 0, 0.0
        if given or count < 2 or not temperature > 0.0:
            raise EvalError(
                f"{self.name}:{argument} is not understood",
                hint=f"{self.name}:n=20,t=0.8 makes 20 attempts per problem at temperature 0.8",
            )
        task = copy.copy(self)
        task.attempts, task.temperature = count, temperature
        ks = [k for k in _KS if k <= count]
        task.name = f"{self.name}:{argument}"
        task.title = f"{self.title}, {count} attempts at temperature {temperature:g}"
        task.measures = tuple(_measure(k, rule) for rule in RULES for k in ks)
        return task

    def params(self, stop: Sequence[str] = ()) -> SamplingParams:
        """How replies are drawn."""
        if self.attempts == 1:
            return replace(GREEDY, stop=tuple(stop))
        return replace(GREEDY, temperature=self.temperature, top_p=0.95, top_k=0, n=self.attempts, stop=tuple(stop))

    @abstractmethod
    def programs(self, sample: Sample, text: str) -> dict[str, str | None]:
        """The program each rule finds in a reply; None where it finds none."""

    @abstractmethod
    def tests(self, sample: Sample) -> str:
        """What runs behind it, and fails where it is wrong."""

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        found = [self.programs(sample, text) for text in answer.texts]
        tests = self.tests(sample)
        asked = [(code, tests) for programs in found for code in programs.values() if code is not None]
        verdicts = dict(zip(asked, judge(asked), strict=True))
        values: dict[str, float] = {}
        extracted: dict[str, str | None] = {}
        for rule in RULES:
            each = [_of(verdicts, programs[rule], tests) for programs in found]
            passed = sum(verdict.passed for verdict in each)
            for k in (k for k in _KS if k <= self.attempts):
                values[_measure(k, rule)] = pass_at_k(len(each), passed, k) if each else 0.0
            codes = [programs[rule] for programs in found]
            extracted[rule] = next((code for code in codes if code is not None), None)
            if each:
                extracted[f"{rule}, run"] = "; ".join(verdict.ending for verdict in each)
        return Scored(values, extracted)


def _of(verdicts: dict[tuple[str, str], Verdict], code: str | None, tests: str) -> Verdict:
    return Verdict(False, "no code") if code is None else verdicts[code, tests]


def _measure(k: int, rule: str) -> str:
    return f"pass@{k}" if rule == "published" else f"pass@{k}, improved extraction"
