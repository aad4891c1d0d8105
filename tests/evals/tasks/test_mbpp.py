"""MBPP on made-up problems: the paper's prompt, what each rule makes of a reply."""

from __future__ import annotations

import json

import pytest

from evals.boxed import need_sandbox
from qwenlet.evals import tasks
from qwenlet.evals.task import Answer, Bench, Continuation, Dialogue
from qwenlet.evals.tasks.mbpp import called


def row(number: int, name: str) -> dict[str, object]:
    return {
        "text": f"Write a function {name}.", "code": f"def {name}(x):\r\n  return x", "task_id": number,
        "test_setup_code": "", "test_list": [f"assert {name}({n}) == {n}" for n in (1, 2)], "challenge_test_list": [],
    }  # fmt: skip


@pytest.fixture
def problems(bench: Bench) -> Bench:
    need_sandbox()
    folder = bench.data.root / "mbpp"
    folder.mkdir(parents=True)
    rows = [row(n, f"f{n}") for n in (1, 2, 3, 4, 11, 12, 511)]
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    looked_through = {
        "source_file": "", "task_id": 12, "prompt": "Write f12.", "code": "def f12(x):\n  return x",
        "test_imports": ["import math"], "test_list": ["assert f12(math.pi) == math.pi"],
    }  # fmt: skip
    (folder / "sanitized-mbpp.json").write_text(json.dumps([looked_through]))
    return bench


def test_the_prompt_is_the_papers(problems: Bench) -> None:
    samples = tasks.get("mbpp").samples(problems)
    assert [sample.id for sample in samples] == ["11", "12"]
    question = samples[0].question
    assert isinstance(question, Continuation)
    shot = (
        "You are an expert Python programmer, and here is your task: Write a function f2. Your code should pass these "
        "tests:\n\nassert f2(1) == 1\nassert f2(2) == 2\n[BEGIN]\ndef f2(x):\n  return x\n[DONE]\n\n"
    )
    assert question.prompt.startswith(shot)
    assert question.prompt.count("[BEGIN]") == 4
    assert question.prompt.endswith("assert f11(1) == 1\nassert f11(2) == 2\n[BEGIN]\n")


def test_a_chat_has_the_examples_as_turns(problems: Bench) -> None:
    question = tasks.get("mbpp-chat").samples(problems)[0].question
    assert isinstance(question, Dialogue)
    assert [message.role for message in question.messages] == ["system"] + ["user", "assistant"] * 3 + ["user"]
    assert question.messages[2].content == "def f2(x):\n  return x\n[DONE]"


def test_the_sanitized_set_has_its_own_words_and_imports(problems: Bench) -> None:
    task = tasks.get("mbpp:sanitized")
    assert (task.name, task.title) == ("mbpp:sanitized", "MBPP (3-shot), sanitized")
    (sample,) = task.samples(problems)
    assert isinstance(sample.question, Continuation)
    assert "Write f12." in sample.question.prompt
    assert set(task.score(sample, Answer(texts=("def f12(x):\n  return x\n",)), problems).values.values()) == {1.0}


@pytest.mark.parametrize(
    ("reply", "published", "improved"),
    [
        ("def f11(x):\n  return x\n", 1.0, 1.0),
        ("[BEGIN]\ndef f11(x):\n  return x\n[DONE]\n\nYou are", 1.0, 1.0),
        ("```python\ndef f11(x):\n  return x\n```", 0.0, 1.0),  # the paper's models wrote no fences
        ("def f11(x):\n  return x\nThat is all.", 0.0, 1.0),
        ("def f11(x):\n  return 0", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_replies(problems: Bench, reply: str, published: float, improved: float) -> None:
    task = tasks.get("mbpp")
    scored = task.score(task.samples(problems)[0], Answer(texts=(reply,)), problems)
    assert dict(scored.values) == {"pass@1": published, "pass@1, improved extraction": improved}


def test_the_name_that_tests_call() -> None:
    code = "def helper(x):\n  return x\ndef main_one(x):\n  return helper(x)\ndef other(x):\n  return x"
    assert called(code, ["assert main_one (3) == 3"]) == "main_one"
    assert called("x = 1", ["assert x"]) == ""
