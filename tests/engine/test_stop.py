"""Stop texts are found wherever the tokens cut them, and nothing that may still become one leaves early."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.config import SamplingParams
from qwenlet.engine.request import Request
from qwenlet.engine.stop import StopTexts, StopTokens

letters = st.text("ab\n", max_size=30)


def feed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    watcher, out = StopTexts(stops), ""
    for piece in pieces:
        text, found = watcher.push(piece)
        out += text
        if found:
            return out, True
    return out + watcher.flush(), False


@given(text=letters, stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), data=st.data())
def test_any_cut_of_the_text_gives_the_same_as_searching_it_whole(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    # the earliest end decides when a stream stops, so the reference looks at growing prefixes
    ends = [min(text.find(s) + len(s) for s in [stop]) for stop in stops if stop in text]
    out, found = feed(stops, pieces)
    assert found == bool(ends)
    if not found:
        assert out == text
        return
    assert text.startswith(out)
    rest = text[len(out) :]
    assert any(rest.startswith(stop) for stop in stops), (out, rest)
    assert not any(stop in out for stop in stops)


def test_a_possible_beginning_is_held_back_and_let_go() -> None:
    watcher = StopTexts(["Observation:"])
    assert watcher.push("I see. Obs") == ("I see. ", False)
    assert watcher.push("erve") == ("Observe", False)
    assert watcher.push(" Observation: x") == (" ", True)


def test_many_long_texts_that_nearly_come_cost_little() -> None:
    """Each token of a reply is held against all of them, for every client's reply at once."""
    watcher = StopTexts(["a" * 900 + "255", *(f"b{number:03}" * 250 for number in range(255))])
    began = time.perf_counter()
    for _ in range(500):
        watcher.push("aaaa")
    assert time.perf_counter() - began < 2.0
    assert watcher.push("255 and more") == ("", True)


def test_tokens_and_sequences() -> None:
    stops = StopTokens([9], [[1, 2, 3]])
    assert stops.hit([5, 9])
    assert stops.hit([1, 2, 3])
    assert not stops.hit([2, 3])
    assert not stops.hit([1, 2, 3, 4])


@pytest.mark.parametrize(("ids", "sequences", "longest"), [([9], [[1, 2, 3], [4]], 3), ([9], [], 1), ([], [[7, 7]], 2)])
def test_the_last_tokens_of_a_reply_are_enough(ids: list[int], sequences: list[list[int]], longest: int) -> None:
    stops = StopTokens(ids, sequences)
    assert stops.longest == longest
    for reply in itertools.product([1, 2, 3, 4, 7, 9], repeat=4):
        assert stops.hit(reply) == stops.hit(reply[-longest:]), reply


def test_a_prompt_is_not_part_of_a_stop() -> None:
    request = Request((1, 2), SamplingParams(max_new_tokens=9, seed=0), 1.0, StopTokens([], [[1, 2, 3]]), StopTexts(()))
    request.known += [3]
    assert request.reply_end(3) == [3]
    request.known += [1, 2, 3]
    assert request.reply_end(3) == [1, 2, 3]
    assert request.stop_tokens.hit(request.reply_end(request.stop_tokens.longest))
