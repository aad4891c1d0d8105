"""Prompts as they come from outside."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from qwenlet.errors import RequestError


def check_prompt(prompt: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The ids as plain numbers. Raises RequestError if there are none, or one is not of this vocabulary."""
    try:
        ids = tuple(operator.index(token) for token in prompt)
    except TypeError:
        raise RequestError(f"a prompt is text or a list of token ids, not {prompt!r:.80}") from None
    if not ids:
        raise RequestError("the prompt is empty", hint="give at least one token")
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"the prompt has token id {wrong}, but this model knows 0 to {vocab_size - 1}")
    return ids


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises RequestError if an id among a request's parameters is not of this vocabulary."""
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"{name} has token id {wrong}, but this model knows 0 to {vocab_size - 1}")
