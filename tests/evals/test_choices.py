"""Reading a choice out of a reply: what the published rules do, bugs included, and what ours do instead."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.errors import MissingExtraError
from qwenlet.evals.choices import LETTERS, improved_chinese, improved_english, published_chinese, published_english

OPTIONS = {"A": "The first pharyngeal arch", "B": "The second arch.", "C": "Both arches", "D": "None of the above"}
QUESTION = "What is the origin of the hyoid bone?"
ZH = {
    "A": "既不保证可靠，也不保证按序交付",
    "B": "不保证可靠，但保证按序交付",
    "C": "保证可靠，但不保证按序交付",
    "D": "既保证可靠，也保证按序交付",
}
ZH_QUESTION = "关于传输层的面向连接服务的特性是____。"


@pytest.mark.parametrize(
    ("reply", "published", "improved"),
    [
        ("The answer is B.", "B", "B"),
        ("I choose C", "C", "C"),
        ("D is correct, because the others are not.", "D", "D"),
        ("B. The second arch", "B", "B"),
        ("(C)", "C", "C"),
        ("both arches", "C", "C"),
        ("It's **D. None of the above**", "D", "D"),
        # what is denied is no answer, and two letters without a statement are none
        ("The answer isn't A, it is B.", "A", None),
        # the article is taken for the letter
        ("A hyoid bone comes from the second arch.", "A", "B"),
        ("A hyoid bone is a bone.", "A", None),
        # the first of two statements against the last
        ("The answer is A. No, wait: the answer is C.", "A", "C"),
        ("Final answer: \\boxed{D}", "D", "D"),
    ],
)
def test_english(reply: str, published: str, improved: str | None) -> None:
    assert published_english(reply, QUESTION, OPTIONS).letter == published
    assert improved_english(reply, QUESTION, OPTIONS).letter == improved


@pytest.mark.parametrize(
    ("reply", "published", "improved"),
    [
        ("答案是B。", "B", "B"),
        ("应该选C", "C", "C"),
        ("正确答案为：【D】", "D", "D"),
        ("A选项正确，其余不对", "A", "A"),
        ("D", "D", "D"),
        ("B．不保证可靠", "B", "B"),
        ("关于传输层的面向连接服务的特性是既保证可靠，也保证按序交付。", "D", "D"),
        ("A不正确，故选B。", "B", "B"),
    ],
)
def test_chinese(reply: str, published: str, improved: str) -> None:
    assert published_chinese(reply, ZH_QUESTION, ZH).letter == published
    assert improved_chinese(reply, ZH_QUESTION, ZH).letter == improved


def test_published_rules_guess_and_say_so() -> None:
    read = published_english("the second one of the arches", QUESTION, OPTIONS)
    assert (read.letter, read.guessed) == ("B", True)
    assert improved_english("the second one of the arches", QUESTION, OPTIONS).letter is None


def test_an_empty_reply_is_a_guess_or_nothing() -> None:
    assert published_english("", QUESTION, OPTIONS).guessed
    assert improved_english("", QUESTION, OPTIONS).letter is None
    assert improved_chinese("", ZH_QUESTION, ZH).letter is None


def test_guessing_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    assert published_english("The answer is B.", QUESTION, OPTIONS).letter == "B"
    with pytest.raises(MissingExtraError, match=r"pip install 'qwenlet\[evals\]'"):
        published_english("hm", QUESTION, OPTIONS)


@given(st.text(max_size=80), st.lists(st.text(max_size=12), min_size=4, max_size=4))
def test_any_reply_is_read_as_a_letter_or_nothing(reply: str, texts: list[str]) -> None:
    options = dict(zip(LETTERS, texts, strict=True))
    for rule in (published_english, published_chinese, improved_english, improved_chinese):
        assert rule(reply, reply, options).letter in (*LETTERS, None)
