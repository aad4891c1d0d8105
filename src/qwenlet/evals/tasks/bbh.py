"""BIG-Bench Hard: 6,511 questions of 27 kinds (Suzgun et al., arXiv:2210.09261), with the paper's worked examples.

An entry of bbh/bbh/boolean_expressions.json; bbh/cot-prompts/boolean_expressions.txt has three worked ones:

    {"input": "not ( True ) and ( True ) is", "target": "False"}
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwenlet.config import SamplingParams
from qwenlet.evals.task import Answer, Bench, Continuation, Result, Sample, Scored, Summary, Task
from qwenlet.evals.tasks.exam import macro_summary

CUT = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=512, stop=("\n\n", "\nQ:"))
_STATED = "the answer is "


class Bbh(Task):
    """3-shot, step by step: the mean over the 27 kinds of exact answers."""

    name = "bbh"
    title = "BBH (3-shot, step by step)"
    kind = "generation"
    measures = ("published", "improved")

    def samples(self, bench: Bench) -> list[Sample]:
        found = []
        for name in bench.data.names("bbh/bbh/"):
            kind = name.rpartition("/")[2].removesuffix(".json")
            # a line that asks to keep the file out of training data, a rule, and then the examples
            examples = bench.data.text(f"bbh/cot-prompts/{kind}.txt").partition("-----\n")[2].strip("\n")
            for number, entry in enumerate(bench.data.json(name)["examples"]):
                prompt = f"{examples}\n\nQ: {entry['input']}\nA: Let's think step by step.\n"
                found.append(Sample(f"{kind}/{number}", Continuation(prompt, CUT), entry["target"], kind))
        return found

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        read = {"published": published(answer.text), "improved": improved(answer.text)}
        return Scored(
            {
                "published": float(read["published"] == sample.target),
                "improved": float(read["improved"] is not None and read["improved"] == _plain(sample.target)),
            },
            {} if answer.error is not None else read,
        )

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        return macro_summary(self, results, {})


def published(reply: str) -> str | None:
    """What stands behind "the answer is ", without the full stop."""
    _, found, rest = reply.partition(_STATED)
    return rest.split("\n")[0].strip().removesuffix(".") if found else None


def improved(reply: str) -> str | None:
    """The last statement of an answer, whatever its case and marks."""
    stated = re.split(r"(?i)\banswer(?:\s+is|\s*:)\s*", reply)
    if len(stated) == 1:
        return None
    return _plain(stated[-1].split("\n")[0]) or None


def _plain(text: str) -> str:
    """In small letters, without marks around it; of "(B) some text" the letter."""
    letter = re.match(r"\s*\(([A-R])\)", text)
    if letter:
        return letter.group(1).lower()
    return " ".join(text.casefold().strip(" .,*\"'`").split())
