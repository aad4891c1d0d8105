"""LongBench, three of its sets with 200 questions each (Bai et al., arXiv:2308.14508).

A line of longctx/longbench/multifieldqa_zh.jsonl, shortened:

    {"input": "全国美国文学研究会的第十八届年会在哪所大学举办的？", "context": "全国美国文学研究会\\n受秘书处委托...",
    "answers": ["厦门大学。"], "length": 9593, "dataset": "multifieldqa_zh", "language": "zh", "_id": "5b1b8e93..."}

A prompt that is too long for the model loses its middle, as published: both ends carry instructions.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qwenlet.chat import render
from qwenlet.evals.extras import library
from qwenlet.evals.figures import Figure
from qwenlet.evals.statistics import grouped, mean
from qwenlet.evals.task import GREEDY, Answer, Bench, Dialogue, Result, Sample, Scored, Summary, Task

PURPOSE = "LongBench's scores"

PROMPTS = {
    "multifieldqa_zh": "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，"
    "只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
    "passage_retrieval_zh": "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。"
    '\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
    "multi_news": "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
    "Now, write a one-page summary of all the news.\n\nSummary:",
}
NEW_TOKENS = {"multifieldqa_zh": 64, "passage_retrieval_zh": 32, "multi_news": 512}


class LongBench(Task):
    """0-shot, chat: a long text and a question; the mean of the sets' own measures."""

    name = "longbench"
    title = "LongBench, three sets (0-shot, chat)"
    kind = "generation"
    chat = True
    measures = ("score",)

    def samples(self, bench: Bench) -> list[Sample]:
        for module in ("jieba", "rouge"):
            library(module, PURPOSE)
        return [
            Sample(f"{name}/{number}", _ask(name, row, bench), row["answers"], name)
            for name in PROMPTS
            for number, row in enumerate(bench.data.json_lines(f"longctx/longbench/{name}.jsonl"))
        ]

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        measure = MEASURES[sample.group]
        return Scored({"score": max(measure(answer.text, target) for target in sample.target)})

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        sets = grouped((result.sample.group, result.scored.values["score"]) for result in results)
        figures = [Figure(f"{name}, {NAMES[name]}", *mean(sets[name])) for name in PROMPTS if name in sets]
        return Summary(tuple(figures))


def _ask(name: str, row: dict[str, Any], bench: Bench) -> Dialogue:
    prompt = PROMPTS[name].format(context=row["context"], input=row["input"])
    params = replace(GREEDY, max_new_tokens=NEW_TOKENS[name])
    around = len(render(bench.tokenizer, Dialogue.ask("", params).messages))
    room = bench.context_length - NEW_TOKENS[name] - around
    ids = bench.tokenizer.encode(prompt, allowed_special=set())
    # a character cut in two may come back as more tokens than it was
    margin = 8
    if len(ids) > room:
        half = (room - margin) // 2
        prompt = bench.tokenizer.decode(ids[:half]) + bench.tokenizer.decode(ids[-half:])
    return Dialogue.ask(prompt, params)


# ---------------------------------------------------------------------------------------------------- measures


def f1_chinese(reply: str, target: str) -> float:
    """F1 of the words both have, as often as both have them; punctuation and case do not count."""
    said, right = (Counter(_words(text)) for text in (reply, target))
    common = (said & right).total()
    if not common:
        return 0.0
    precision, recall = common / said.total(), common / right.total()
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    jieba = library("jieba", PURPOSE)
    jieba.setLogLevel("ERROR")
    words = ("".join(letter for letter in word.lower() if not _is_mark(letter)) for word in jieba.cut(text))
    return [plain for word in words if (plain := "".join(word.split()))]


def _is_mark(letter: str) -> bool:
    code = ord(letter)
    return letter in string.punctuation or any(first <= code <= last for first, last in _CHINESE_MARKS)


# what the published score leaves out: full-width ASCII, CJK brackets and stops (without U+300A), dashes, quotes
_CHINESE_MARKS = (
    (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F),
    (0x2026, 0x2027), (0xFE4F, 0xFE4F),
)  # fmt: skip


def passage_number(reply: str, target: str) -> float:
    """The share of the numbers in the reply that are the target's."""
    wanted = re.findall(r"段落(\d+)", target)[0]
    numbers = re.findall(r"\d+", reply)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def rouge_l(reply: str, target: str) -> float:
    """ROUGE-L's F of the package `rouge`, which the published scores use."""
    rouge = library("rouge", PURPOSE)
    try:
        value: float = rouge.Rouge().get_scores([reply], [target], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):  # nothing but marks; its search is recursive
        return 0.0
    return value


MEASURES: dict[str, Callable[[str, str], float]] = {
    "multifieldqa_zh": f1_chinese,
    "passage_retrieval_zh": passage_number,
    "multi_news": rouge_l,
}
NAMES = {"multifieldqa_zh": "F1", "passage_retrieval_zh": "accuracy", "multi_news": "ROUGE-L"}
