r"""HumanEval: 164 functions to write from their head and description, judged by tests (Chen et al., arXiv:2107.03374).

A line of humaneval/HumanEval.jsonl.gz, shortened:

    {"task_id": "HumanEval/23", "prompt": "\n\ndef strlen(string: str) -> int:\n    \"\"\" Return length of given
    string\n    >>> strlen('')\n    0\n ... \"\"\"\n", "entry_point": "strlen", "canonical_solution":
    "    return len(string)\n", "test": "...def check(candidate):\n    assert candidate('') == 0\n ..."}

`humaneval` gives the head and takes what follows; `humaneval-chat` asks for the function. Greedy, one attempt, unless
an argument asks for more: humaneval:n=20,t=0.8 makes 20 at that temperature and says pass@1 and pass@10.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from qwenlet.evals import sandbox
from qwenlet.evals.attempts import AttemptsTask
from qwenlet.evals.programs import body, defines, definitions
from qwenlet.evals.task import Bench, Continuation, Dialogue, Sample

FILE = "humaneval/HumanEval.jsonl.gz"

# each begins at a place where both rules below have ended
_STOPS = ("\ndef ", "\n\nclass ", "\n\nif __name__", "\n\nprint(", "\n\nassert ", "\n```")
# the published rule cuts here, the first of each
_CUTS = ("<|endoftext|>", "\n\n\n", "\n\n", "def ")


class HumanEval(AttemptsTask):
    """The head of a function, and what the model goes on with."""

    name = "humaneval"
    title = "HumanEval (0-shot)"
    kind = "generation"

    def samples(self, bench: Bench) -> list[Sample]:
        sandbox.check()
        params = self.params(stop=_STOPS)
        return [_sample(row, Continuation(row["prompt"], params)) for row in bench.data.json_lines(FILE)]

    def programs(self, sample: Sample, text: str) -> dict[str, str | None]:
        """Published: up to the first blank line, or the first "def ". Improved: up to the first line at the margin."""
        prompt: str = sample.fields["prompt"]
        published = text
        for cut in _CUTS:
            published = published.split(cut)[0]
        return {"published": prompt + published, "improved": prompt + body(text)}

    def tests(self, sample: Sample) -> str:
        return _tests(sample)


class HumanEvalChat(AttemptsTask):
    """The function is asked for, and found in the reply."""

    name = "humaneval-chat"
    title = "HumanEval (0-shot, chat)"
    kind = "generation"
    chat = True

    def samples(self, bench: Bench) -> list[Sample]:
        sandbox.check()
        params = self.params()
        return [_sample(row, Dialogue.ask(question(row), params)) for row in bench.data.json_lines(FILE)]

    def programs(self, sample: Sample, text: str) -> dict[str, str | None]:
        """Published: a function's body, put behind the prompt. Improved: all of the code, behind the prompt's imports
        and helpers; a body alone counts, too."""
        prompt, name = sample.fields["prompt"], sample.fields["entry_point"]
        return {"published": prompt + published_body(text, name), "improved": _whole(text, prompt, name)}

    def tests(self, sample: Sample) -> str:
        return _tests(sample)


def _sample(row: dict[str, Any], question: Continuation | Dialogue) -> Sample:
    fields = {name: row[name] for name in ("prompt", "entry_point", "test")}
    return Sample(row["task_id"], question, row["canonical_solution"], fields=fields)


def _tests(sample: Sample) -> str:
    return f"{sample.fields['test']}\ncheck({sample.fields['entry_point']})"


def question(row: dict[str, Any]) -> str:
    """As published, of HumanEvalPack's fields, which are read out of the prompt here: its head and its description."""
    head, description = head_and_description(row["prompt"], row["entry_point"])
    return f"Write a Python function `{head}` to solve the following problem:\n{description}\n{row['prompt']}"


def head_and_description(prompt: str, name: str) -> tuple[str, str]:
    """("strlen(string: str) -> int", "Return length of given string\\n>>> ...")."""
    found = re.search(rf"^def ({re.escape(name)}\(.*?):\s*?\n(.*)\Z", prompt, re.S | re.M)
    assert found is not None, f"the prompt of {name} has no such function"
    text = found[2].strip()
    description = text.removeprefix(text[:3]).removesuffix(text[:3]) if text[:3] in ('"""', "'''") else text
    first, newline, rest = description.strip().partition("\n")
    return found[1], first + newline + textwrap.dedent(rest)


def published_body(text: str, name: str) -> str:
    """The function's body: in a fenced block, else behind its head, else behind any head; else the reply, indented."""
    to_margin = r":\n(.*?)(?:\n(?!\n*(?:  |\t))|\Z)"
    for pattern in (
        rf"```(?:[Pp]ython\n)?.*?def\s+{name}.*?:\n(.*?)\n```",
        rf"def\s+{name}.*?{to_margin}",
        rf"def.*?{to_margin}",
    ):
        if found := re.search(pattern, text, re.S):
            return found[1]
    return textwrap.indent(text, "    ")


def _whole(text: str, prompt: str, name: str) -> str | None:
    """The program of a reply; None where there is no code."""
    helpers = prompt[: prompt.rindex("def ")]
    code = definitions(text, name, helpers)
    if code is not None:
        return helpers + code
    for rest in _bodies(text):
        if defines(prompt + rest, name):
            return prompt + rest
    return None


def _bodies(text: str) -> Sequence[str]:
    """What may be a body alone: fenced or not, as it is or indented."""
    fenced = re.findall(r"```[^\n]*\n(.*?)```", text, re.S)
    return [form for code in (*fenced, text) if code.strip() for form in (body(code), textwrap.indent(code, "    "))]
