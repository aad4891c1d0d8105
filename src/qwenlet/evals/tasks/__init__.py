"""The tasks, by name: one module per benchmark, imported only when its task is asked for.

A task of your own: a subclass of `Task` in a module of its own here, and a line in the table.
"""

from __future__ import annotations

import difflib
import importlib

from qwenlet.errors import EvalError
from qwenlet.evals.task import Task

# name -> (module, class). A name with an argument is written NAME:ARGUMENT (perplexity:FILE).
TASKS: dict[str, tuple[str, str]] = {
    "mmlu": ("mmlu", "Mmlu"),
    "mmlu-chat": ("mmlu", "MmluChat"),
    "ceval": ("ceval", "Ceval"),
    "ceval-chat": ("ceval", "CevalChat"),
    "ceval-test": ("ceval", "CevalTest"),
    "cmmlu": ("cmmlu", "Cmmlu"),
    "gsm8k": ("gsm8k", "Gsm8k"),
    "gsm8k-chat": ("gsm8k", "Gsm8kChat"),
    "gsm8k-chat-4shot": ("gsm8k", "Gsm8kChat4"),
    "bbh": ("bbh", "Bbh"),
    "longbench": ("longbench", "LongBench"),
    "perplexity": ("perplexity", "Perplexity"),
    "wikitext2": ("perplexity", "WikiText2"),
    "zh-perplexity": ("perplexity", "Chinese"),
    "humaneval": ("humaneval", "HumanEval"),
    "humaneval-chat": ("humaneval", "HumanEvalChat"),
    "mbpp": ("mbpp", "Mbpp"),
    "mbpp-chat": ("mbpp", "MbppChat"),
    "tool-use": ("tool_use", "ToolUse"),
    "tool-use-en": ("tool_use", "ToolUseEn"),
    "tool-use-zh": ("tool_use", "ToolUseZh"),
    "mt-bench": ("mt_bench", "MtBench"),
    "length": ("length", "Length"),
    "needle": ("needle", "Needle"),
    "needle-zh": ("needle", "NeedleZh"),
}


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        EvalError: there is none; the message names the nearest.
    """
    base, colon, argument = name.partition(":")
    if base not in TASKS:
        near = difflib.get_close_matches(base, TASKS, 1)
        raise EvalError(
            f"there is no task {base!r}; known are {', '.join(TASKS)}",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    module, kind = TASKS[base]
    task: Task = getattr(importlib.import_module(f"qwenlet.evals.tasks.{module}"), kind)()
    if colon:
        task = task.with_argument(argument)
    return task
