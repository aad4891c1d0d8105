"""What the first run kept is what the second one gets, and nothing is computed for it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from qwenlet.ops import replay


def test_the_second_run_gets_what_the_first_computed() -> None:
    computed: list[int] = []

    def run() -> list[torch.Tensor]:
        def compute(number: int) -> torch.Tensor:
            computed.append(number)
            return torch.full((3,), float(number))

        return [replay.once(lambda number=number: compute(number)) for number in (4, 7)]  # type: ignore[misc]

    tape = replay.Tape()
    with tape.keeping:
        first = run()
    for _ in range(2):  # backward may come twice
        with tape.giving:
            again = run()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert computed == [4, 7]
    assert not replay.active()
    run()
    assert computed == [4, 7, 4, 7], "without a tape everything is computed"


def test_a_second_run_that_asks_for_more_is_a_mistake() -> None:
    tape = replay.Tape()
    with tape.keeping:
        replay.once(lambda: torch.ones(1))
    with tape.giving:
        replay.once(lambda: torch.ones(1))
        with pytest.raises(AssertionError, match="kept 1 results"):
            replay.once(lambda: torch.ones(1))
    assert not replay.active()


def test_a_tape_is_let_go_with_the_graph_and_not_at_some_later_time() -> None:
    """A step's products would stand in memory beside the next one's."""
    gc.disable()
    try:
        tape = replay.Tape()
        contexts = tape.keeping, tape.giving
        with contexts[0]:
            replay.once(lambda: torch.ones(1))
        gone = weakref.ref(tape)
        del tape, contexts
        assert gone() is None
    finally:
        gc.enable()
