"""Published figures to stand beside ours: the model card's, its peers' in the card, and the base model's.

Shares in percent, as printed. The card's own are zero-shot, of Qwen-1.8B-Chat; where a task of ours has the few-shot
form of the base model, the published figure is that of Qwen-1.8B.
"""

from __future__ import annotations

CHAT, BASE = "Qwen-1.8B-Chat", "Qwen-1.8B"
UNQUALIFIED = "bf16"  # the precision of published figures that name none

# columns of the card's quality table: title -> task
QUALITY = {"MMLU": "mmlu-chat", "C-Eval val": "ceval-chat", "GSM8K": "gsm8k-chat", "HumanEval": "humaneval-chat"}

# task -> precision -> figure
BY_PRECISION: dict[str, dict[str, float]] = {
    "mmlu-chat": {"fp32": 43.4, "bf16": 43.3, "int8": 43.1, "int4": 42.9},
    "ceval-chat": {"fp32": 57.0, "bf16": 55.6, "int8": 55.8, "int4": 52.8},
    "gsm8k-chat": {"fp32": 33.0, "bf16": 33.7, "int8": 33.0, "int4": 31.2},
    "humaneval-chat": {"fp32": 26.8, "bf16": 26.2, "int8": 27.4, "int4": 25.0},
}

# task -> (whose, figure); few-shot forms
OF_BASE: dict[str, float] = {
    "mmlu": 45.3,
    "ceval": 56.1,
    "cmmlu": 52.1,
    "gsm8k": 32.3,
    "humaneval": 15.2,
    "mbpp": 14.2,
    "bbh": 22.3,
}

CEVAL_TEST_COLUMNS = ("Average", "STEM", "Social sciences", "Humanities", "Other")
CEVAL_TEST: dict[str, tuple[float | None, ...]] = {
    "Chinese-Alpaca-Plus-13B": (41.5, 36.6, 49.7, 43.1, 41.2),
    "Chinese-Alpaca-2-7B": (40.3, None, None, None, None),
    "ChatGLM2-6B-Chat": (50.1, 46.4, 60.4, 50.6, 46.9),
    "Baichuan-13B-Chat": (51.5, 43.7, 64.6, 56.2, 49.2),
    CHAT: (53.8, 48.4, 68.0, 56.5, 48.3),
    "Qwen-7B-Chat": (58.6, 53.3, 72.1, 62.8, 52.0),
}

# task -> model -> figure, in the card's order
PEERS: dict[str, dict[str, float]] = {
    "ceval-chat": {
        "RedPajama-INCITE-Chat-3B": 18.3,
        "OpenBuddy-3B": 23.5,
        "Firefly-Bloom-1B4": 23.6,
        "OpenLLaMA-Chinese-3B": 24.4,
        "LLaMA2-7B-Chat": 31.9,
        "ChatGLM2-6B-Chat": 52.6,
        "InternLM-7B-Chat": 53.6,
        CHAT: 55.6,
        "Qwen-7B-Chat": 59.7,
    },
    "mmlu-chat": {
        "Firefly-Bloom-1B4": 23.8,
        "OpenBuddy-3B": 25.5,
        "RedPajama-INCITE-Chat-3B": 25.5,
        "OpenLLaMA-Chinese-3B": 25.7,
        "ChatGLM2-6B-Chat": 46.0,
        "LLaMA2-7B-Chat": 46.2,
        "InternLM-7B-Chat": 51.1,
        "Baichuan2-7B-Chat": 52.9,
        CHAT: 43.3,
        "Qwen-7B-Chat": 55.8,
    },
    "humaneval-chat": {
        "Firefly-Bloom-1B4": 0.6,
        "OpenLLaMA-Chinese-3B": 4.9,
        "RedPajama-INCITE-Chat-3B": 6.1,
        "OpenBuddy-3B": 10.4,
        "ChatGLM2-6B-Chat": 11.0,
        "LLaMA2-7B-Chat": 12.2,
        "Baichuan2-7B-Chat": 13.4,
        "InternLM-7B-Chat": 14.6,
        CHAT: 26.2,
        "Qwen-7B-Chat": 37.2,
    },
    "gsm8k-chat": {
        "Firefly-Bloom-1B4": 2.4,
        "RedPajama-INCITE-Chat-3B": 2.5,
        "OpenLLaMA-Chinese-3B": 3.0,
        "OpenBuddy-3B": 12.6,
        "LLaMA2-7B-Chat": 26.3,
        "ChatGLM2-6B-Chat": 28.8,
        "Baichuan2-7B-Chat": 32.8,
        "InternLM-7B-Chat": 33.0,
        CHAT: 33.7,
        "Qwen-7B-Chat": 50.3,
    },
}


def published(task: str, precision: str) -> tuple[str, float] | None:
    """(whose, figure) of a task at a precision; what names no precision stands for all of them."""
    if task in BY_PRECISION:
        by_precision = BY_PRECISION[task]
        return CHAT, by_precision.get(precision, by_precision[UNQUALIFIED])
    if task == "ceval-test":
        average = CEVAL_TEST[CHAT][0]
        assert average is not None, "the card gives its own average"
        return CHAT, average
    return (BASE, OF_BASE[task]) if task in OF_BASE else None
