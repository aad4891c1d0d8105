"""A clock that stands still while this program does: a machine that is suspended, or a program that is stopped and goes
on, must not look like a server that hangs."""

from __future__ import annotations

import threading
import time

_TICK = 0.05
_LONGEST_TICK = 1.0  # a busy machine may be late by so much; more is a stop


class OwnTime:
    """Seconds in which this program ran, and when it did not."""

    def __init__(self) -> None:
        self._own, self._stopped_at = 0.0, float("-inf")
        threading.Thread(target=self._tick, daemon=True).start()

    def now(self) -> float:
        return self._own

    def stopped_since(self, moment: float) -> bool:
        """Whether the program was stopped after its own time was `moment`."""
        return self._stopped_at >= moment - _TICK

    def _tick(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(_TICK)
            now = time.monotonic()
            if now - last > _LONGEST_TICK + _TICK:
                self._stopped_at = self._own
            self._own += min(now - last, _LONGEST_TICK)
            last = now
