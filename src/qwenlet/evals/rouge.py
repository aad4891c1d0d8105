"""Rouge-L as the published tool-use script takes it: over a tokenizer's tokens, cut again at white space."""

from __future__ import annotations

from collections.abc import Sequence

from qwenlet.tokenizer import Tokenizer


def rouge_l(reference: str, text: str, tokenizer: Tokenizer) -> float:
    """F-measure of the longest common subsequence of two texts' words, from 0 to 1; 0 where one has none."""
    wanted, found = words(reference, tokenizer), words(text, tokenizer)
    common = longest_common(wanted, found)
    return 2 * common / (len(wanted) + len(found)) if common else 0.0


def words(text: str, tokenizer: Tokenizer) -> list[str]:
    """Tokens joined by blanks and cut at white space, as published: a token of white space alone is none."""
    ids = tokenizer.encode(text, allowed_special=set())
    return " ".join(tokenizer.token_bytes(id).decode("utf-8", "replace") for id in ids).split()


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for one in first:
        above = row
        row = [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if one == other else max(above[column + 1], row[column]))
    return row[-1]
