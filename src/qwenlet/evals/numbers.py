"""Which number a reply ends with: the published rules of GSM8K, and ours."""

from __future__ import annotations

import math
import re

_DIGITS = re.compile(r"\d+")
_LAST_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])(?:[1-9]\d{0,2}(?:,\d{3})*|\d*)(?:\.\d*)?(?!\d)")
_GOLD = re.compile(r"#### (-?[0-9.,]+)")

_NUMBER = r"-?\$?\d+(?:,\d{3})*(?:\.\d+)?"
_STATED = re.compile(
    rf"(?:(?i:answer)(?:\s+is|\s*:)|答案(?:是|为|：|:)|####|\\boxed\{{)[\s*:：$=约]*(?:\\\$)?({_NUMBER})", re.ASCII
)
_ANY = re.compile(rf"(?<![\w.])({_NUMBER})|(?<=[^\w.-])({_NUMBER})", re.ASCII)


def gold(answer: str) -> float:
    """The number behind "####" of a worked answer; NaN where there is none."""
    found = _GOLD.search(answer)
    return math.nan if found is None else _value(found.group(1).rstrip("."))


def published_base(reply: str) -> str | None:
    """The last run of digits; one with a zero in front is no number there."""
    runs = _DIGITS.findall(reply)
    return None if not runs or _has_leading_zero(runs[-1]) else runs[-1]


def published_chat(reply: str) -> str | None:
    """The last number with its sign, thousands and decimals."""
    found = [match.group() for match in _LAST_NUMBER.finditer(reply)]
    if not found:
        return None
    text = found[-1].replace(",", "").removeprefix("+")
    return None if "." not in text and _has_leading_zero(text.removeprefix("-")) else text


def improved(reply: str) -> str | None:
    """The number of the last statement of an answer, else the last number at all."""
    if stated := _STATED.findall(reply):
        return _plain(stated[-1])
    found = [match.group(1) or match.group(2) for match in _ANY.finditer(reply)]
    return _plain(found[-1]) if found else None


def equal(text: str | None, value: float) -> bool:
    """Within 1e-4, as published."""
    return text is not None and math.isclose(_value(text), value, rel_tol=0.0, abs_tol=1e-4)


def _plain(text: str) -> str:
    return text.replace("$", "").replace(",", "")


def _has_leading_zero(digits: str) -> bool:
    return len(digits) > 1 and digits[0] == "0" and digits.strip("0") != ""


def _value(text: str) -> float:
    try:
        return float(_plain(text))
    except ValueError:
        return math.nan
