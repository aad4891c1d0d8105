"""Pieces of text, and the care taken with runs that would break the regex engine or the normaliser."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet import pretokenizer
from qwenlet.pretokenizer import GPT2, QWEN, SMOLLM, PreTokenizer

RULES = pytest.mark.parametrize("rule", [QWEN, GPT2, SMOLLM], ids=lambda rule: rule.name)
BLANKS = " \t\n\r\x0b\x85\u2003\u3000"
TEXTS = st.text(st.sampled_from("ab1१½一é\u0301'.<!\x1c" + BLANKS), max_size=40)


def test_qwen_takes_digits_one_by_one_and_one_blank_with_a_word():
    assert QWEN.pieces("in 2024  we'RE\n\n ok") == ["in", " ", "2", "0", "2", "4", " ", " we", "'RE", "\n\n", " ok"]


def test_gpt2_takes_digits_together_with_the_blank_before():
    assert GPT2.pieces("in 2024  we're") == ["in", " 2024", " ", " we", "'re"]


def test_smollm_keeps_blanks_before_a_digit_together():
    assert SMOLLM.pieces("a   12   b") == ["a", "   ", "1", "2", "  ", " b"]


@RULES
@given(text=TEXTS)
def test_pieces_lose_nothing(rule: PreTokenizer, text: str):
    assert "".join(rule.pieces(text)) == rule.normalize(text)


@RULES
@given(text=TEXTS)
def test_chunks_end_where_pieces_end(rule: PreTokenizer, text: str):
    """With the limit at 2, nearly every run of blanks is a long one."""
    text = rule.normalize(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokenizer, "_LONG_RUN", 2)
        chunks = list(rule.chunks(text))
    assert [piece for chunk in chunks for piece in rule.pieces(chunk)] == rule.pieces(text)


@given(text=st.text(st.sampled_from("aé가각ᄀ\u0301\u0316\u0323\u0f71\u0f73\u0344\u034f\u20dd"), max_size=60))
def test_ordering_marks_first_does_not_change_nfc(text: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokenizer, "_LONG_MARKS", 2)
        assert QWEN.normalize(text) == unicodedata.normalize("NFC", text)


def test_a_flood_of_unordered_marks_is_normalised_quickly():
    """Left to itself, the normaliser takes minutes for this."""
    started = time.perf_counter()
    assert len(QWEN.normalize("e" + "\u0300\u0316" * 200_000)) == 400_000
    assert time.perf_counter() - started < 5
