"""Reading a number out of a reply: the published rules with their bugs, and ours."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.evals.numbers import equal, gold, improved, published_base, published_chat


@pytest.mark.parametrize(
    ("reply", "value", "base", "chat", "ours"),
    [
        ("The answer is 18", 18, True, True, True),
        ("So she makes 9 * 2 = $18 a day.", 18, True, True, True),
        # digits only: commas, decimals and signs are lost
        ("The answer is 20,800", 20800, False, True, True),
        ("The answer is 2.5", 2.5, False, True, True),
        ("The answer is -3", -3, False, True, True),
        ("It costs $1,234.50 in all.", 1234.5, False, True, True),
        # a number behind the answer
        ("The answer is 18. Check: 9 * 2 is right, step 3.", 18, False, False, True),
        ("#### 18\nThat took 4 steps", 18, False, False, True),
        ("\\boxed{18} in 2 lines", 18, False, False, True),
        ("答案是18元，共2步", 18, False, False, True),
        # a zero in front is no number to Python's eval, which the published rules use
        ("Her code is 007", 7, False, False, True),
        ("nothing at all", 18, False, False, False),
    ],
)
def test_what_is_read(reply: str, value: float, base: bool, chat: bool, ours: bool) -> None:
    assert equal(published_base(reply), value) == base
    assert equal(published_chat(reply), value) == chat
    assert equal(improved(reply), value) == ours


def test_the_reference_is_behind_the_marks() -> None:
    assert gold("2+1=<<2+1=3>>3 bolts\n#### 3") == 3
    assert gold("...\n#### 1,000") == 1000
    assert gold("...\n#### -2.5") == -2.5
    assert math.isnan(gold("no marks"))
    assert not equal("3", gold("no marks"))


@given(st.text("0123456789.,+-$ \nabc答案是#", max_size=60))
def test_any_reply_is_a_number_or_nothing(reply: str) -> None:
    for read in (published_base, published_chat, improved):
        text = read(reply)
        assert text is None or not math.isnan(float(text))


@given(st.integers(-(10**6), 10**6))
def test_whole_numbers_are_found_however_they_are_written(value: int) -> None:
    for text in (f"The answer is {value}", f"= {value:,}.", f"so it is ${value:,} in all"):
        assert equal(improved(text), value)
