"""Guessing the next tokens from the text itself, so that one step may yield several.

What follows the latest earlier occurrence of the newest few tokens is proposed; the engine runs the guesses together
with the newest token and draws each position as it would have been drawn anyway, so a guess is right or it isn't: the
reply stays the same (prompt lookup decoding, Saxena 2023). It pays where a step gains more tokens than it takes longer,
which `Speculation` watches.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 4, 2  # tokens that must agree, tried in this order
GUESSES = 6  # at most, of one step


class Lookup:
    """Where runs of tokens ended last in a growing text."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        # of each run of so many tokens: the place behind its latest occurrence, and behind the one before
        self._places: dict[tuple[int, ...], tuple[int, int | None]] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        self._tokens.append(token)
        end = len(self._tokens)
        for size in range(_SHORTEST, min(_LONGEST, end) + 1):
            run = tuple(self._tokens[end - size :])
            latest = self._places.get(run)
            self._places[run] = (end, None if latest is None else latest[0])

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the newest ones the last time; perhaps none."""
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            found = self._places.get(tuple(self._tokens[-size:])) if len(self._tokens) >= size else None
            if found is not None and found[1] is not None:
                return self._tokens[found[1] : found[1] + count]
        return []


class Speculation:
    """Whether guessing pays: tokens a second of steps with guesses against those of steps without, lately.

    Steps without guesses come by themselves, wherever the text doesn't repeat. Where guesses lose they pause, longer
    each time, and are tried again.
    """

    _MEMORY = 0.8  # of an average, per observation
    _FIRST_PAUSE, _LONGEST_PAUSE = 16, 512  # steps

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self._plain: float | None = None  # seconds of a step without guesses
        self._seconds: float | None = None  # of a step with guesses
        self._tokens = 0.0  # it yields
        self._pause, self._left = self._FIRST_PAUSE, 0

    def wanted(self) -> bool:
        """Asked once a step."""
        if self._left:
            self._left -= 1
            return False
        return True

    def observe_plain(self, seconds: float) -> None:
        self._plain = self._mean(self._plain, seconds)

    def observe(self, guesses: int, right: int, seconds: float) -> None:
        self.drafted += guesses
        self.accepted += right
        self._tokens = self._mean(None if self._seconds is None else self._tokens, right + 1.0)
        self._seconds = self._mean(self._seconds, seconds)
        if self._plain is None:
            return
        if self._tokens * self._plain < self._seconds:
            self._left, self._pause = self._pause, min(2 * self._pause, self._LONGEST_PAUSE)
            self._seconds = None  # judged anew by what comes then
        elif right == guesses:
            self._pause = self._FIRST_PAUSE

    def _mean(self, mean: float | None, value: float) -> float:
        return value if mean is None else self._MEMORY * mean + (1.0 - self._MEMORY) * value
