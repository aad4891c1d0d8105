"""HumanEval on two made-up problems: prompts to the letter, what each rule makes of a reply, pass@k."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import qwenlet
from evals.boxed import need_sandbox
from qwenlet.errors import EvalError, SandboxError
from qwenlet.evals import sandbox, tasks
from qwenlet.evals.run import Run
from qwenlet.evals.task import Answer, Bench, Continuation, Dialogue, Result
from qwenlet.evals.tasks.humaneval import head_and_description, published_body

PROMPT = '''from typing import List


def total(numbers: List[int]) -> int:
    """ Sum of all numbers.
    >>> total([1, 2])
    3
    """
'''
HELPED = '''def double(x: int) -> int:
    """twice"""
    return 2 * x


def fourfold(x):
    \'\'\'
    Four times.
    \'\'\'
'''
PROBLEMS = [
    {
        "task_id": "HumanEval/0", "prompt": PROMPT, "entry_point": "total",
        "canonical_solution": "    result = 0\n\n    for one in numbers:\n        result += one\n    return result",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    },
    {
        "task_id": "HumanEval/1", "prompt": HELPED, "entry_point": "fourfold",
        "canonical_solution": "    return double(double(x))\n",
        "test": "def check(candidate):\n    assert candidate(2) == 8\n",
    },
]  # fmt: skip


@pytest.fixture
def problems(bench: Bench) -> Bench:
    need_sandbox()
    path = bench.data.root / "humaneval" / "HumanEval.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in PROBLEMS).encode()))
    return bench


def endings(bench: Bench, name: str, number: int, *replies: str) -> dict[str, float]:
    task = tasks.get(name)
    return dict(task.score(task.samples(bench)[number], Answer(texts=replies), bench).values)


def test_the_prompt_is_the_functions_head(problems: Bench) -> None:
    question = tasks.get("humaneval").samples(problems)[0].question
    assert isinstance(question, Continuation)
    assert question.prompt == PROMPT
    assert question.params.temperature == 0.0


def test_the_chat_prompt_is_the_published_one(problems: Bench) -> None:
    question = tasks.get("humaneval-chat").samples(problems)[0].question
    assert isinstance(question, Dialogue)
    assert [message.role for message in question.messages] == ["system", "user"]
    assert question.messages[1].content == (
        "Write a Python function `total(numbers: List[int]) -> int` to solve the following problem:\n"
        "Sum of all numbers.\n>>> total([1, 2])\n3\n" + PROMPT
    )


def test_head_and_description_of_the_last_function() -> None:
    assert head_and_description(HELPED, "fourfold") == ("fourfold(x)", "Four times.")


def test_the_published_rule_ends_at_the_first_blank_line(problems: Bench) -> None:
    """A right solution with a blank line in it is right, but the published figure says no: hence two figures."""
    solution = PROBLEMS[0]["canonical_solution"]
    assert endings(problems, "humaneval", 0, solution) == {"pass@1": 0.0, "pass@1, improved extraction": 1.0}
    assert endings(problems, "humaneval", 0, "    return sum(numbers)\n\n\ndef more():\n    pass") == {
        "pass@1": 1.0, "pass@1, improved extraction": 1.0,
    }  # fmt: skip


def test_wrong_code_says_how_it_ended(problems: Bench) -> None:
    task = tasks.get("humaneval")
    scored = task.score(task.samples(problems)[0], Answer(texts=("    return 3",)), problems)
    assert set(scored.values.values()) == {0.0}
    assert scored.extracted["published, run"] == "exit 1: AssertionError"
    assert scored.extracted["published"] == PROMPT + "    return 3"


@pytest.mark.parametrize(
    ("reply", "published", "improved"),
    [
        ("```python\ndef fourfold(x):\n    return 4 * x\n```", 1.0, 1.0),
        ("Here:\n\ndef fourfold(x):\n    return 4 * x\n\nDone.", 1.0, 1.0),
        ("    return double(double(x))", 0.0, 1.0),  # indented once more than it should be
        ("return double(double(x))", 1.0, 1.0),
        ("```python\nFOUR = 4\ndef fourfold(x):\n    return FOUR * x\n```", 0.0, 1.0),  # loses what stands before
        ("I don't know.", 0.0, 0.0),
    ],
)
def test_chat_replies(problems: Bench, reply: str, published: float, improved: float) -> None:
    found = endings(problems, "humaneval-chat", 1, reply)
    assert found == {"pass@1": published, "pass@1, improved extraction": improved}


def test_a_reply_without_code_counts_as_unread(problems: Bench) -> None:
    task = tasks.get("humaneval-chat")
    scored = task.score(task.samples(problems)[1], Answer(texts=("I don't know.",)), problems)
    assert scored.extracted["improved"] is None
    assert scored.extracted["improved, run"] == "no code"


def test_the_published_body_falls_back_to_any_function() -> None:
    assert published_body("def g(x):\n    return 1\nend", "f") == "    return 1"
    assert published_body("return 1\nreturn 2", "f") == "    return 1\n    return 2"


def test_several_attempts(problems: Bench) -> None:
    task = tasks.get("humaneval:n=4,t=0.5")
    sample = task.samples(problems)[0]
    assert isinstance(sample.question, Continuation)
    assert (sample.question.params.n, sample.question.params.temperature) == (4, 0.5)
    replies = ("    return sum(numbers)", "    return 0", "    return sum(numbers)", "    return 1")
    result = Result(sample, Answer(texts=replies), task.score(sample, Answer(texts=replies), problems))
    assert result.scored.values["pass@1"] == 0.5
    assert [figure.name for figure in task.summary([result], problems).figures] == [
        "pass@1", "pass@1, improved extraction",
    ]  # fmt: skip
    assert "pass@10" in tasks.get("humaneval:n=10").measures


@pytest.mark.parametrize("argument", ["", "n", "n=1", "n=x", "n=3,t=0", "n=3,q=1", "20"])
def test_arguments_that_mean_nothing(argument: str) -> None:
    with pytest.raises(EvalError, match="not understood"):
        tasks.get(f"humaneval:{argument}")


def test_without_a_sandbox_nothing_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is asked anything, and before data is looked for."""
    sandbox.interpreter.cache_clear()
    monkeypatch.setattr(sandbox, "_command", lambda: None)
    for name in ("humaneval", "humaneval-chat", "mbpp", "mbpp-chat"):
        with pytest.raises(SandboxError, match="bubblewrap"):
            tasks.get(name).samples(bench)
    sandbox.interpreter.cache_clear()


def test_a_run_of_a_real_engine(problems: Bench, llm: qwenlet.LLM, byte_qwen: Path, tmp_path: Path) -> None:
    """Random weights write no function; the run says so, and can be taken up."""
    run = Run(tmp_path / "run", problems.data, "byte-qwen")

    def load(precision: str) -> qwenlet.LLM:
        return qwenlet.load(str(byte_qwen), device="cpu", dtype="fp32", max_context=2048)

    (outcome,) = run.evaluate(["humaneval"], load)
    assert outcome.summary.figures[0].value == 0.0
    assert outcome.computed == 2
    (again,) = run.evaluate(["humaneval"], load)
    assert again.computed == 0
    assert again.summary == outcome.summary
