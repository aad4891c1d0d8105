"""GSM8K: 1,319 problems of grade-school arithmetic (Cobbe et al., arXiv:2110.14168).

A line of gsm8k/test.jsonl:

    {"question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it
    take?", "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\\nSo the total amount of fabric is
    2+1=<<2+1=3>>3 bolts of fabric\\n#### 3"}
"""

from __future__ import annotations

import re
from collections.abc import Callable

from qwenlet.config import SamplingParams
from qwenlet.evals import numbers
from qwenlet.evals.task import GREEDY, Answer, Bench, Continuation, Dialogue, Question, Sample, Scored, Task

TEST, TRAIN = "gsm8k/test.jsonl", "gsm8k/train.jsonl"
EIGHT_SHOTS = "gsm8k/qwen_gsm8k_prompt.txt"
# the published worked answers of the chat form; the data set itself doesn't bring them
FOUR_SHOTS = "gsm8k/qwen_gsm8k_chat_prompt.txt"
# how the four problems of that form begin, so that they can be taken from the training set
FOUR_PROBLEMS = (
    "Angelo and Melanie want",
    "Mark's basketball team",
    "Bella has two times",
    "A group of 4 fruit baskets",
)
STEP = "\nLet's think step by step"
CUT = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=512, stop=("\n\n", "Question:"))


class Gsm8k(Task):
    """8-shot: worked examples, and the continuation up to the next blank line or question."""

    name = "gsm8k"
    title = "GSM8K (8-shot)"
    kind = "generation"
    measures = ("published", "improved")
    published: Callable[[str], str | None] = staticmethod(numbers.published_base)

    def samples(self, bench: Bench) -> list[Sample]:
        ask = self.asking(bench)
        return [
            Sample(str(number), ask(row["question"]), numbers.gold(row["answer"]))
            for number, row in enumerate(bench.data.json_lines(TEST))
        ]

    def asking(self, bench: Bench) -> Callable[[str], Question]:
        """What turns a problem into a question."""
        shots = bench.data.text(EIGHT_SHOTS)
        return lambda problem: Continuation(f"{shots}\nQuestion: {problem}{STEP}\n", CUT)

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        if answer.error is not None:
            return Scored({"published": 0.0, "improved": 0.0})
        read = {"published": self.published(answer.text), "improved": numbers.improved(answer.text)}
        values = {name: float(numbers.equal(text, sample.target)) for name, text in read.items()}
        return Scored(values, read)


class Gsm8kChat(Gsm8k):
    """0-shot: the problem alone."""

    name = "gsm8k-chat"
    title = "GSM8K (0-shot, chat)"
    chat = True
    published = staticmethod(numbers.published_chat)

    def asking(self, bench: Bench) -> Callable[[str], Question]:
        return lambda problem: Dialogue.ask(problem, GREEDY)


class Gsm8kChat4(Gsm8kChat):
    """4-shot: four worked problems and the question in one message.

    The published wording of the four solutions is read from gsm8k/qwen_gsm8k_chat_prompt.txt where that file is; else
    the training set's own solutions of the same four problems stand in for it.
    """

    name = "gsm8k-chat-4shot"
    title = "GSM8K (4-shot, chat)"

    def asking(self, bench: Bench) -> Callable[[str], Question]:
        shots = bench.data.text(FOUR_SHOTS) if bench.data.has(FOUR_SHOTS) else _from_training_set(bench)
        return lambda problem: Dialogue.ask(f"{shots}Question: {problem}{STEP}", GREEDY)


def _from_training_set(bench: Bench) -> str:
    rows = bench.data.json_lines(TRAIN)
    found = [next(row for row in rows if row["question"].startswith(begin)) for begin in FOUR_PROBLEMS]
    return "".join(f"Question: {row['question']}{STEP}\n{_worked(row['answer'])}\n\n" for row in found)


def _worked(answer: str) -> str:
    """Without the calculator's notes, and with the result as a sentence."""
    steps, _, result = re.sub(r"<<.*?>>", "", answer).partition("\n#### ")
    return f"{steps}\nThe answer is {result}"
