"""Small data folders in the published layouts, written by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from qwenlet.evals.tasks.mmlu import CATEGORY


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def table(*rows: tuple[str, ...]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def mmlu(root: Path, questions: int = 2) -> None:
    """Every subject: five examples and some questions."""
    for number, subject in enumerate(CATEGORY):
        shots = [(f"example {n}?", "w", "x", "y", "z", "ABCD"[n % 4]) for n in range(5)]
        asked = [(f"{subject} {n}?", "one", "two", "three", "four", "ABCD"[(n + number) % 4]) for n in range(questions)]
        write(root, f"mmlu/dev/{subject}_dev.csv", table(*shots))
        write(root, f"mmlu/test/{subject}_test.csv", table(*asked))


def ceval(root: Path) -> None:
    """Two subjects of two categories, one of them hard."""
    mapping = {"logic": ["Logic", "逻辑学", "Humanities"], "college_physics": ["College Physics", "大学物理", "STEM"]}
    write(root, "ceval/subject_mapping.json", json.dumps(mapping))
    head = ("id", "question", "A", "B", "C", "D", "answer")
    for subject in mapping:
        shots = [(f"{n}", f"例{n}____。", "甲", "乙", "丙", "丁", "ABCD"[n % 4], "因为") for n in range(5)]
        write(root, f"ceval/dev/{subject}_dev.csv", table((*head, "explanation"), *shots))
        asked = [(f"{n}", f"题{n}____。", "甲甲", "乙乙", "丙丙", "丁丁", "ABCD"[n]) for n in range(4)]
        write(root, f"ceval/val/{subject}_val.csv", table(head, *asked))
        write(root, f"ceval/test/{subject}_test.csv", table(head[:-1], *(row[:-1] for row in asked)))


def gsm8k(root: Path, questions: int = 3) -> None:
    rows = [
        {"question": f"What is {n} plus 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(questions)
    ]
    write(root, "gsm8k/test.jsonl", lines(*rows))
    write(
        root, "gsm8k/qwen_gsm8k_prompt.txt", "Question: What is 1 plus 1?\nLet's think step by step\nThe answer is 2\n"
    )
    starts = ("Mark's basketball team", "A group of 4 fruit baskets", "Angelo and Melanie want", "Bella has two times")
    train = [{"question": f"{start} ...?", "answer": f"2*3=<<2*3=6>>6\n#### {n}"} for n, start in enumerate(starts)]
    write(root, "gsm8k/train.jsonl", lines(*train))
