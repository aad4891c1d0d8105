"""MT-Bench: 80 questions of two turns (Zheng et al., arXiv:2306.05685). The answers are made here; a judge model, which
is not part of this package, gives them their marks.

A line of mtbench/question.jsonl:

    {"question_id": 83, "category": "writing", "turns": ["Imagine you are writing a blog post comparing two popular
    smartphone models. Develop an outline ...", "Take your previous response and rephrase it as a limerick."]}

Beside the figures a run leaves answers.jsonl, which FastChat's judge reads (as data/mt_bench/model_answer/NAME.jsonl),
and judge.jsonl, the judge's prompts with the answers put in, for any other. Temperatures are those of FastChat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenlet.chat import Message
from qwenlet.checkpoint import DEFAULT_SYSTEM
from qwenlet.evals.figures import Figure
from qwenlet.evals.statistics import mean
from qwenlet.evals.task import GREEDY, Answer, Bench, Dialogue, Result, Sample, Scored, Summary, Task

FOLDER = "mtbench"
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
_NEW_TOKENS = 1024
_WITH_REFERENCE = ("math", "reasoning", "coding")  # what the judge gets a reference answer for


class MtBench(Task):
    """Two turns each; says which answers came to an end, and writes them out for a judge."""

    name = "mt-bench"
    title = "MT-Bench (answers, not judged)"
    kind = "generation"
    chat = True
    measures = ("answers that end by themselves",)

    def samples(self, bench: Bench) -> list[Sample]:
        found = []
        for row in bench.data.json_lines(f"{FOLDER}/question.jsonl"):
            first, *later = row["turns"]
            params = replace(GREEDY, temperature=TEMPERATURES[row["category"]], top_p=1.0, top_k=0)
            messages = (Message("system", DEFAULT_SYSTEM), Message("user", first))
            question = Dialogue(messages, replace(params, max_new_tokens=_NEW_TOKENS), tuple(later))
            found.append(Sample(str(row["question_id"]), question, None, row["category"], {"turns": row["turns"]}))
        return found

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        whole = answer.error is None and all(answer.texts) and set(answer.finish_reasons) == {"stop"}
        return Scored({self.measures[0]: float(whole)})

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        lengths = [result.answer.new_tokens / max(len(result.answer.texts), 1) for result in results]
        figures = [
            Figure(self.measures[0], *mean([result.scored.values[self.measures[0]] for result in results])),
            Figure("tokens per answer", *mean(lengths), unit="number"),
        ]
        prompts = {row["name"]: row for row in bench.data.json_lines(f"{FOLDER}/judge_prompts.jsonl")}
        references = {
            str(row["question_id"]): row["choices"][0]["turns"]
            for row in bench.data.json_lines(f"{FOLDER}/reference_answer/gpt-4.jsonl")
        }
        answered = [result for result in results if len(result.answer.texts) == len(result.sample.fields["turns"])]
        files = {
            "answers.jsonl": _lines(_answer(result) for result in answered),
            "judge.jsonl": _lines(
                entry
                for result in answered
                for entry in _to_judge(result, prompts, references.get(result.sample.id, ()))
            ),
        }
        return Summary((*figures, *self.by_group(results)), files=files)


def _lines(values: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _answer(result: Result) -> dict[str, Any]:
    turns = list(result.answer.texts)
    return {
        "question_id": int(result.sample.id),
        "answer_id": result.sample.prompt_sha256[:22],
        "model_id": "qwenlet",
        "choices": [{"index": 0, "turns": turns}],
    }


def _to_judge(
    result: Result, prompts: Mapping[str, Mapping[str, str]], reference: Sequence[str]
) -> list[dict[str, Any]]:
    """What a judge is asked about the first turn, and about the second."""
    sample, answers = result.sample, result.answer.texts
    kind = "-math" if sample.group in _WITH_REFERENCE and reference else ""
    questions = sample.fields["turns"]
    known: dict[str, str] = {"question": questions[0], "answer": answers[0]}
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
        known |= {f"question_{number}": question, f"answer_{number}": answer}
    for number, text in enumerate(reference, 1):
        known |= {f"ref_answer_{number}": text}
    asked = []
    for turn, suffix in ((1, "-v1"), (2, "-v1-multi-turn")):
        prompt = prompts[f"single{kind}{suffix}"]
        text = prompt["prompt_template"].format(**known)
        asked.append({"question_id": int(sample.id), "turn": turn, "system": prompt["system_prompt"], "prompt": text})
    return asked
