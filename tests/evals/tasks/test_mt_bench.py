"""MT-Bench on two made-up questions: turns, temperatures, and what is left for a judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qwenlet
from qwenlet.evals import tasks
from qwenlet.evals.run import Run
from qwenlet.evals.task import Answer, Bench, Dialogue, Result

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write {a} poem.", "Shorter."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]},
]
PROMPTS = {
    "single-v1": "Q: {question} A: {answer}",
    "single-v1-multi-turn": "1: {question_1} {answer_1} 2: {question_2} {answer_2}",
    "single-math-v1": "Q: {question} A: {answer} R: {ref_answer_1}",
    "single-math-v1-multi-turn": "R: {ref_answer_1} {ref_answer_2} 2: {question_2} {answer_2}",
}


@pytest.fixture
def questions(bench: Bench) -> Bench:
    folder = bench.data.root / "mtbench"
    (folder / "reference_answer").mkdir(parents=True)
    prompts = [{"name": name, "system_prompt": "Judge.", "prompt_template": text} for name, text in PROMPTS.items()]
    reference = [{"question_id": 111, "choices": [{"turns": ["2", "4"]}]}]
    for name, rows in (("question", QUESTIONS), ("judge_prompts", prompts), ("reference_answer/gpt-4", reference)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return bench


def answered(questions: Bench) -> list[Result]:
    task = tasks.get("mt-bench")
    answer = Answer(texts=("one", "two"), finish_reasons=("stop", "stop"), new_tokens=10)
    return [Result(sample, answer, task.score(sample, answer, questions)) for sample in task.samples(questions)]


def test_two_turns_at_the_temperature_of_the_category(questions: Bench) -> None:
    writing, math = (sample.question for sample in tasks.get("mt-bench").samples(questions))
    assert isinstance(writing, Dialogue)
    assert isinstance(math, Dialogue)
    assert writing.then == ("Shorter.",)
    assert (writing.params.temperature, math.params.temperature) == (0.7, 0.0)


def test_what_a_judge_is_asked(questions: Bench) -> None:
    summary = tasks.get("mt-bench").summary(answered(questions), questions)
    judged = [json.loads(line) for line in summary.files["judge.jsonl"].splitlines()]
    assert [entry["prompt"] for entry in judged] == [
        "Q: Write {a} poem. A: one",
        "1: Write {a} poem. one 2: Shorter. two",
        "Q: 1 + 1? A: one R: 2",
        "R: 2 4 2: And 2 + 2? two",
    ]


def test_answers_are_in_the_judges_layout(questions: Bench) -> None:
    summary = tasks.get("mt-bench").summary(answered(questions), questions)
    first = json.loads(summary.files["answers.jsonl"].splitlines()[0])
    assert first["question_id"] == 81
    assert first["choices"] == [{"index": 0, "turns": ["one", "two"]}]
    assert {figure.name: figure.value for figure in summary.figures}["tokens per answer"] == 5.0


def test_an_answer_that_was_cut_or_is_missing_does_not_count(questions: Bench) -> None:
    task = tasks.get("mt-bench")
    sample = task.samples(questions)[0]
    for answer in (
        Answer(texts=("one", "two"), finish_reasons=("stop", "length")),
        Answer(texts=("", "two"), finish_reasons=("stop", "stop")),
        Answer(error="too long"),
    ):
        scored = task.score(sample, answer, questions)
        assert set(scored.values.values()) == {0.0}
        # none of it goes to a judge unless both turns are there
        files = task.summary([Result(sample, answer, scored)], questions).files
        assert bool(files["judge.jsonl"]) is bool(answer.texts)


def test_a_run_leaves_the_files(questions: Bench, byte_qwen: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", questions.data, "byte-qwen")
    run.evaluate(["mt-bench"], lambda _: qwenlet.load(str(byte_qwen), device="cpu", dtype="fp32", max_context=3000))
    answers = (tmp_path / "run" / "files" / "mt-bench.as-is.answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in answers] == [81, 111]
