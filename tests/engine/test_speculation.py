"""Guesses from the text, and whether they pay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwenlet.engine.speculation import Lookup, Speculation


def test_what_followed_the_last_time_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 2, 3])
    assert lookup.guess(3) == [4, 5, 6]
    lookup.add(9)
    assert lookup.guess(3) == []
    assert Lookup([1, 2, 8, 1, 2, 9, 1, 2]).guess(2) == [9, 1], "the latest occurrence counts"
    assert Lookup([5, 1, 2, 8, 6, 1, 2, 9, 5, 1, 2]).guess(1) == [8], "a longer agreement counts more"
    assert Lookup([]).guess(4) == []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5))
def test_a_guess_is_what_a_search_finds(tokens: list[int], count: int) -> None:
    expected: list[int] = []
    for size in (4, 3, 2):
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if len(tokens) >= size and ends:
            expected = tokens[ends[-1] : ends[-1] + count]
            break
    assert Lookup(tokens).guess(count) == expected


def test_guesses_that_lose_pause_longer_each_time_and_are_tried_again() -> None:
    s = Speculation()
    s.observe_plain(1.0)
    pauses = []
    for _ in range(8):
        assert s.wanted()
        s.observe(6, 0, 2.0)
        pauses.append(next(n for n in range(1000) if s.wanted()))
        s._left = 0
    assert pauses == [16, 32, 64, 128, 256, 512, 512, 512]
    assert (s.drafted, s.accepted) == (48, 0)


def test_guesses_that_win_go_on() -> None:
    s = Speculation()
    s.observe_plain(1.0)
    for _ in range(50):
        assert s.wanted()
        s.observe(6, 3, 2.0)
    assert s.accepted == 150
